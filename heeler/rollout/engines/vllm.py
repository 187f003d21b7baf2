"""vLLM as an engine: in the trainer's process, on a GPU or on the CPU.

vLLM packs, fuses and renames weights, so a copy of the model under Hugging Face names receives each publish, and a
commit hands all of it to vLLM's own reload. vLLM starts from random weights: nothing that it samples could pass for
the policy unless the publish worked. After every commit a fixed probe is scored by both models.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from heeler.rollout.engines.stopping import special_stops
from heeler.rollout.engines.weights import WeightReceiver
from heeler.runtime.packages import require
from heeler.types import CheckFailed, Completion, HeelerError, Request, Sampling

PROBE_TOKENS = 32
# mean nats a token; the probe's tokens are random, so their log-probabilities are large, and bfloat16's rounding too
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
ENVIRONMENT = {  # where the user has not set it
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # weights pass as tensors
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads are the same ones
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class VLLMEngine(WeightReceiver):
    """vLLM behind the protocol of `heeler.types.Engine`.

    Draws belong to the request's seed, but they are not the native engine's draws.

    Args:
        model: a causal LM that belongs to the engine and receives the weights under their Hugging Face names. Its
            dtype is vLLM's.
        eos_ids: tokens that end a completion.
        max_rows: completions sampled at once.
        token_bias: `[V]` zero or minus infinity (a token mask), or None.
        tokenizer: finds stop strings; needed only where `Sampling.stop` is used.
        memory: share of a GPU for vLLM's weights and cache; the trainer lives on the same one.

    Raises:
        HeelerError: vLLM is not installed, cannot run this model, or has not enough memory.
    """

    def __init__(
        self,
        model: Any,
        *,
        eos_ids: Sequence[int],
        max_rows: int = 128,
        token_bias: Tensor | None = None,
        tokenizer: Any = None,
        memory: float = 0.4,
    ) -> None:
        require("vllm", "vllm")
        super().__init__(model)
        self.eos_ids = sorted(eos_ids)
        self.allowed = None if token_bias is None else (token_bias == 0).nonzero()[:, 0].tolist()
        self.tokenizer = tokenizer
        vocabulary = model.get_output_embeddings().weight.shape[0]
        self.probe = torch.randint(vocabulary, (PROBE_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        vllm: Any = importlib.import_module("vllm")  # its environment is read here
        self.sampling_params: Any = vllm.SamplingParams
        weight = next(model.parameters())
        device: dict[str, Any] = (
            {"gpu_memory_utilization": memory} if weight.is_cuda else {"enforce_eager": True}  # no compiler's wait
        )
        with tempfile.TemporaryDirectory() as folder:
            model.config.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            try:
                self.llm: Any = vllm.LLM(
                    model=folder,
                    load_format="dummy",
                    dtype=str(weight.dtype).removeprefix("torch."),
                    generation_config="vllm",  # the model's own would bring penalties and cut-offs
                    logprobs_mode="processed_logprobs",  # of the distribution that is sampled from
                    skip_tokenizer_init=tokenizer is None,
                    max_num_seqs=max_rows,
                    disable_log_stats=True,
                    seed=0,
                    **device,
                )
            except (ValueError, RuntimeError, NotImplementedError) as error:
                raise HeelerError(f"vLLM does not start with this model: {str(error).strip()}") from error
        for kind in {type(module) for module in model.modules()}:
            # what vLLM runs by transformers' own classes it wraps, for the models that exist already too
            if kind.__call__ is not torch.nn.Module.__call__ and not hasattr(kind, "do_not_compile"):
                kind.do_not_compile = True
        self.commit(0)

    def commit(self, version: int) -> None:
        """Reload vLLM's weights, forget cached prefixes, and compare both models on the probe.

        Raises:
            CheckFailed: vLLM scores the probe with other weights.
        """
        super().commit(version)
        weights = [(name, parameter.detach()) for name, parameter in self._parameters.items()]  # tied ones twice
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.reset_prefix_cache()
        gap = float((self._probe_logprobs() - self._probe_reference()).abs().mean())
        if not gap <= PROBE_TOLERANCE[next(self.model.parameters()).dtype]:
            raise CheckFailed(
                f"vLLM's log-probabilities of a probe are {gap:.2g} nats a token from the published model's: this"
                " version of vLLM does not take the weights of this architecture; use --engine native"
            )

    def _probe_logprobs(self) -> Tensor:
        """`[PROBE_TOKENS - 1]` by vLLM."""
        params = self.sampling_params(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)
        (output,) = self.llm.generate([{"prompt_token_ids": self.probe}], params, use_tqdm=False)
        entries = zip(self.probe[1:], output.prompt_logprobs[1:], strict=True)
        return torch.tensor([entry[token].logprob for token, entry in entries])

    @torch.no_grad()
    def _probe_reference(self) -> Tensor:
        """`[PROBE_TOKENS - 1]` by transformers."""
        ids = torch.tensor([self.probe], device=next(self.model.parameters()).device)
        logprobs = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        return logprobs.gather(1, ids[0, 1:, None])[:, 0].cpu()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.check_ready()
        if sampling.stop and self.tokenizer is None:
            raise HeelerError("stop strings need the tokenizer: pass it to VLLMEngine")
        special = special_stops(self.tokenizer, sampling.stop) if sampling.stop else {}
        strings = [text for text in sampling.stop if text not in special.values()]
        params = [
            self.sampling_params(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                seed=request.seed,
                stop=strings or None,
                stop_token_ids=[*self.eos_ids, *special],
                ignore_eos=True,  # eos_ids say it all
                allowed_token_ids=self.allowed,
                logprobs=0,
                detokenize=bool(strings),
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": list(request.prompt)} for request in requests]
        outputs = [output.outputs[0] for output in self.llm.generate(prompts, params, use_tqdm=False)]
        return [self._completion(output) for output in outputs]

    def _completion(self, output: Any) -> Completion:
        tokens = list(output.token_ids)
        entries = zip(tokens, output.logprobs, strict=True)
        return Completion(
            tokens=tokens,
            logprobs=torch.tensor([entry[token].logprob for token, entry in entries]),
            finish_reason=output.finish_reason,
            version=self.version,
            stop_string=output.stop_reason if isinstance(output.stop_reason, str) else None,
        )
