"""Makes openrlhf_losses.json: losses, their gradients and KL estimates by OpenRLHF, to compare `heeler.ppo` with.

    python -m venv peer && peer/bin/pip install torch==2.13.0 && peer/bin/pip install --no-deps openrlhf==0.11.2
    peer/bin/python tests/ppo/golden/make_openrlhf_losses.py

Heeler is not needed and not imported. OpenRLHF's two modules are loaded by themselves, without its package, which wants
DeepSpeed and GPUs.
"""

import importlib.metadata
import importlib.util
import json
import pathlib
import platform
import sys
import types

import torch

VERSION = "0.11.2"


def load(name: str) -> types.ModuleType:
    """A module of openrlhf.models, without what the package imports."""
    path = importlib.metadata.distribution("openrlhf").locate_file(f"openrlhf/models/{name}.py")
    spec = importlib.util.spec_from_file_location(f"openrlhf.models.{name}", str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def listed(x: torch.Tensor) -> list:
    return x.detach().double().tolist()


def main() -> None:
    assert importlib.metadata.version("openrlhf") == VERSION
    sys.modules["deepspeed"] = types.ModuleType("deepspeed")  # imported, and not used by what is called here
    for package in ("openrlhf", "openrlhf.models"):
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = []
    utils, loss = load("utils"), load("loss")
    generator = torch.Generator().manual_seed(0)

    def normal(scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(4, 6, generator=generator, dtype=torch.float64)

    old, mask = -normal().abs() - 0.1, (torch.rand(4, 6, generator=generator) < 0.8).double()
    mask[:, 0] = 1
    new = (old + normal(0.4)).requires_grad_()
    advantages, returns, old_values, ref = normal(), normal(), normal(), old + normal(0.3)
    values = (old_values + normal(0.4)).requires_grad_()
    found: dict = {
        "made_by": f"openrlhf {VERSION}, torch {torch.__version__}, python {platform.python_version()}",
        "mask": listed(mask), "old_logprobs": listed(old), "new_logprobs": listed(new), "ref_logprobs": listed(ref),
        "advantages": listed(advantages), "returns": listed(returns), "old_values": listed(old_values),
        "values": listed(values), "policy": [], "value": [], "kl": {},
    }  # fmt: skip
    for low, high in ((0.2, 0.2), (0.2, 0.28), (0.05, 0.4)):
        for tokens in (True, False):
            result = loss.PolicyLoss(low, high, token_level_loss=tokens)(new, old, advantages, mask)
            value = result[0] if isinstance(result, tuple) else result
            (gradient,) = torch.autograd.grad(value, new)
            found["policy"].append(
                {"low": low, "high": high, "tokens": tokens, "loss": value.item(), "gradient": listed(gradient)}
            )
    for clip in (None, 0.2):
        value = loss.ValueLoss(clip)(values, old_values, returns, mask)
        (gradient,) = torch.autograd.grad(value, values)
        found["value"].append({"clip": clip, "loss": value.item(), "gradient": listed(gradient)})
    for estimator in ("k1", "k2", "k3"):
        found["kl"][estimator] = listed(utils.compute_approx_kl(new.detach(), ref, kl_estimator=estimator))
    pathlib.Path(__file__).with_name("openrlhf_losses.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
