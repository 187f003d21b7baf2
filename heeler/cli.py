"""The command line. Verbs are dispatched before anything heavy is imported, so `heeler --help` answers at once."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from heeler.runtime.packages import did_you_mean
from heeler.types import HeelerError

HELP = """heeler: PPO for language models, control and games

  heeler ppo imdb                       a real 135M model learns to continue movie reviews positively
  heeler ppo translate [--data F]       a small T5, fine-tuned and then rewarded by chrF and BLEU
  heeler ppo lm --model M --prompts F --reward module:function
                                        your model, your prompts, your reward
  heeler ppo dialogue --model M --prompts F --env module:Name
                                        episodes of several turns, with tools or any environment of texts
  heeler ppo gym --env ID               any Gymnasium environment, or yours: --env module:Name
  heeler ppo cartpole                   tuned recipes: acrobot, mountaincar, pendulum, lunarlander,
                                        lunarlander-continuous, bipedalwalker, halfcheetah, hopper, walker2d, ant,
                                        swimmer, pong, breakout
  heeler ppo arithmetic | qa [--data F] fine-tuning, then PPO with a verifier: Reasoning Gym, questions, or yours
  heeler ppo calculator                 the same in dialogues: sums, and a calculator to call
  heeler rlhf imdb                      fine-tuning, a reward model from preferences, PPO
  heeler rlhf lm --model M --demonstrations F --preferences F --prompts F
                                        the same on your own files
  heeler sft --model M --data F         supervised fine-tuning on prompts and completions, chats or texts
  heeler reward --model M --data F      a reward model from preferences (chosen, rejected) or labels
  heeler reward imdb [--full]           the reward model of the recipe
  heeler serve-reward SPEC [--port N]   a reward behind HTTP: module:function, or the folder of a classifier
  heeler eval RUN                       held-out figures of a run's policy; --episodes N --video F for environments
  heeler sample RUN_OR_MODEL --prompt P [--prompt P ...]
                                        what a policy writes
  heeler resume RUN [--updates N]       continue a run from its last checkpoint
  heeler export RUN --onnx F            an environment's policy as an ONNX file

Every verb explains its flags: heeler ppo lm --help"""

CONTROL = (
    "cartpole", "acrobot", "mountaincar", "pendulum", "lunarlander", "lunarlander-continuous", "bipedalwalker",
    "halfcheetah", "hopper", "walker2d", "ant", "swimmer", "pong", "breakout",
)  # fmt: skip
RECIPES = ("imdb", "translate", "lm", "dialogue", "arithmetic", "calculator", "qa", "gym", *CONTROL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 2 input that cannot be used, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(words)
    except HeelerError as error:
        print(f"heeler: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, without importing torch
            raise
        print(
            f"heeler: the device's memory is full ({str(error).partition('. ')[0]}): sample fewer completions at once"
            " (--engine-rows), train fewer layers or LoRA adapters, take --activation-checkpointing or a smaller"
            " --ppo.token-budget; where a checkpoint was kept, heeler resume RUN continues it",
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"heeler: cannot write {error.filename or 'a file'}: {error.strerror}; free some space and start the same"
            " command again; where a checkpoint was kept, heeler resume RUN continues it",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as interrupt:
        told = str(interrupt) or "interrupted before training began: start the same command again, the cache stays"
        print(f"\nheeler: {told}", file=sys.stderr)
        return 130


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if words[0] == "--version":
        from heeler import __version__

        print(f"heeler {__version__}")
        return 0
    verbs: dict[str, Callable[[list[str]], int]] = {
        "ppo": _ppo, "sft": _sft, "reward": _reward, "rlhf": _rlhf, "serve-reward": _serve_reward, "eval": _eval,
        "sample": _sample, "resume": _resume, "export": _export,
    }  # fmt: skip
    if words[0] not in verbs:
        raise HeelerError(f"there is no verb {words[0]!r}{did_you_mean(words[0], verbs)}; heeler --help lists them")
    return verbs[words[0]](words[1:])


def _parse(cls: Any, words: list[str], prog: str) -> Any:
    import tyro

    return tyro.cli(cls, args=words, prog=prog)


def _recipe(verb: str, words: list[str], recipes: Sequence[str]) -> tuple[str, list[str]]:
    if not words or words[0] in ("-h", "--help"):
        print(f"heeler {verb} takes a recipe: {', '.join(recipes)}. Its flags: heeler {verb} {recipes[0]} --help")
        raise SystemExit(0 if words else 2)
    if words[0] not in recipes:
        raise HeelerError(
            f"there is no recipe {words[0]!r} for heeler {verb}{did_you_mean(words[0], recipes)}; there are:"
            f" {', '.join(recipes)}"
        )
    return words[0], words[1:]


def _ppo(words: list[str]) -> int:
    recipe, rest = _recipe("ppo", words, RECIPES)
    if recipe == "gym" or recipe in CONTROL:
        return _ppo_gym(recipe, rest)
    if recipe == "arithmetic":
        from heeler.recipes.tasks import Arithmetic, run_arithmetic

        run_arithmetic(_parse(Arithmetic, rest, "heeler ppo arithmetic"))
        return 0
    if recipe == "calculator":
        from heeler.recipes.calculator import Calculator, run_calculator

        run_calculator(_parse(Calculator, rest, "heeler ppo calculator"))
        return 0
    if recipe == "qa":
        from heeler.recipes.tasks import QA, run_qa

        run_qa(_parse(QA, rest, "heeler ppo qa"))
        return 0
    if recipe == "translate":
        from heeler.recipes.translate import Translate, run_translate

        run_translate(_parse(Translate, rest, "heeler ppo translate"))
        return 0
    if recipe == "imdb":
        from heeler.recipes.imdb import IMDB, run_imdb

        run = run_imdb(_parse(IMDB, rest, "heeler ppo imdb"))
    elif recipe == "dialogue":
        from heeler.train.dialogue import DialogueConfig, train_dialogue

        run = train_dialogue(_parse(DialogueConfig, rest, "heeler ppo dialogue"))
    else:
        from heeler.train.text import TextConfig, train_text

        run = train_text(_parse(TextConfig, rest, "heeler ppo lm"))
    _report(run)
    return 0


def _ppo_gym(recipe: str, words: list[str]) -> int:
    from dataclasses import replace

    import tyro

    from heeler.recipes.control import RECIPES as CONFIGS
    from heeler.train.control import train_gym

    words, id = _take(words, "--env")
    words, kwargs = _take(words, "--env-kwargs")
    if recipe == "gym":
        if id is None and not {"-h", "--help"} & {*words}:
            raise HeelerError("heeler ppo gym needs an environment: --env CartPole-v1, or --env my_module:MyEnv")
        from heeler.recipes.control import default_config

        config = default_config(id or "CartPole-v1")
    else:
        config = CONFIGS[recipe]()
        if id is not None:
            config = replace(config, env=replace(config.env, id=id))
    if kwargs is not None:
        config = replace(config, env=replace(config.env, kwargs=_json_object(kwargs, "--env-kwargs")))
    config = tyro.cli(
        type(config), args=words, prog=f"heeler ppo {recipe}", default=config,
        config=(tyro.conf.CascadeSubcommandArgs,),  # flags may stand behind network:nature-cnn too
    )  # fmt: skip
    run = train_gym(config)
    from heeler.train.evaluate_control import print_gym_report

    print_gym_report(run)
    return 0


def _take(words: list[str], flag: str) -> tuple[list[str], str | None]:
    """The words without `flag VALUE` (or `flag=VALUE`), and the value."""
    for i, word in enumerate(words):
        if word == flag:
            if i + 1 == len(words):
                raise HeelerError(f"{flag} needs a value")
            return words[:i] + words[i + 2 :], words[i + 1]
        if word.startswith(f"{flag}="):
            return words[:i] + words[i + 1 :], word.partition("=")[2]
    return words, None


def _json_object(text: str, flag: str) -> dict[str, Any]:
    import json

    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise HeelerError(f"{flag}: broken JSON ({error.msg} at character {error.pos}): {text}") from error
    if not isinstance(value, dict):
        raise HeelerError(f'{flag} must be a JSON object like {{"continuous": true}}, not {text}')
    return value


def _rlhf(words: list[str]) -> int:
    recipe, rest = _recipe("rlhf", words, ("imdb", "lm"))
    if recipe == "lm":
        from heeler.recipes.rlhf_lm import RLHFLM, run_rlhf_lm

        run_rlhf_lm(_parse(RLHFLM, rest, "heeler rlhf lm"))
        return 0
    from heeler.recipes.rlhf import RLHF, run_rlhf

    run_rlhf(_parse(RLHF, rest, "heeler rlhf imdb"))
    return 0


def _sft(words: list[str]) -> int:
    from heeler.train.sft import SFTConfig, print_sft_report, train_sft

    print_sft_report(train_sft(_parse(SFTConfig, words, "heeler sft")))
    return 0


@dataclass(frozen=True, kw_only=True)
class RewardIMDB:
    """Train the reward model for movie reviews and keep it in the cache.

    Attributes:
        full: the long training that aims at 90 % (an hour or two on a laptop's CPU).
        seed: of its training.
        retrain: train again even where it is in the cache.
    """

    full: bool = False
    seed: int = 0
    retrain: bool = False


def _reward(words: list[str]) -> int:
    if words and words[0].startswith("--") and words[0] != "--help":
        from heeler.train.reward_run import RewardTask, train_reward

        train_reward(_parse(RewardTask, words, "heeler reward"))
        return 0
    if words in (["-h"], ["--help"]):
        print("heeler reward imdb [--full]: the reward model of the recipe; heeler reward --model M --data F: yours")
        words = ["--model", "M", "--help"]
        return _reward(words)
    _, rest = _recipe("reward", words, ("imdb",))
    chosen = _parse(RewardIMDB, rest, "heeler reward imdb")
    from heeler.recipes.imdb import imdb_reward_model

    imdb_reward_model(full=chosen.full, seed=chosen.seed, retrain=chosen.retrain)
    return 0


@dataclass(frozen=True, kw_only=True)
class ServeReward:
    """Answer for a reward over HTTP, until Ctrl-C. There is no authentication.

    Attributes:
        host: address to listen on; 0.0.0.0 lets other machines ask.
        port: to listen on; 0 takes a free one.
        device: of a classifier; "auto" takes a GPU where there is one.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"


def _serve_reward(words: list[str]) -> int:
    spec, rest = _positional(words, "serve-reward", "module:function or the folder of a classifier")
    chosen = _parse(ServeReward, rest, "heeler serve-reward SPEC")
    from heeler.rewards.serve import make_server
    from heeler.runtime.machine import choose_device
    from heeler.train.text import load_reward

    try:
        reward = load_reward(spec, choose_device(chosen.device))
        with make_server(reward, chosen.host, chosen.port, spec) as server:
            print(f"{spec} answers at {server.url} (Ctrl-C stops): heeler ppo lm ... --reward {server.url}", flush=True)
            server.serve_forever()
    except KeyboardInterrupt:
        print(f"\n{spec} no longer answers")
    return 0


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Continue a run.

    Attributes:
        updates: go on to this many updates; the run's own number where None.
    """

    updates: int | None = None


def _positional(words: list[str], verb: str, what: str) -> tuple[str, list[str]]:
    if not words or words[0].startswith("-"):
        if words and words[0] in ("-h", "--help"):
            return "", words
        raise HeelerError(f"heeler {verb} needs {what} first")
    return words[0], words[1:]


def _resume(words: list[str]) -> int:
    path, rest = _positional(words, "resume", "a run folder")
    chosen = _parse(Resume, rest, "heeler resume RUN")
    verb = _verb(path)
    if verb == "sft":
        from heeler.train.sft import print_sft_report, resume_sft

        print_sft_report(resume_sft(path, updates=chosen.updates))
        return 0
    if verb == "reward":
        from heeler.train.reward_run import resume_reward

        if chosen.updates is not None:
            raise HeelerError("a reward model is trained on a number of tokens: leave --updates out")
        resume_reward(path)
        return 0
    if verb == "ppo gym":
        from heeler.train.control import resume_gym
        from heeler.train.evaluate_control import print_gym_report

        print_gym_report(resume_gym(path, updates=chosen.updates))
        return 0
    if verb == "ppo dialogue":
        from heeler.train.dialogue import resume_dialogue

        _report(resume_dialogue(path, updates=chosen.updates))
        return 0
    from heeler.train.text import resume_text

    _report(resume_text(path, updates=chosen.updates))
    return 0


def _verb(path: str) -> str:
    """The verb that made a run folder, for instance "ppo gym"."""
    from heeler.runtime.runs import RunFolder

    return str(RunFolder.open(path).read_config().get("verb")) if path else ""


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluate a run's policy on held-out prompts, or in its environment.

    Attributes:
        prompts: of a language model: a file or a data set; the run's own evaluation prompts where None.
        episodes: of an environment.
        seed: of the episodes.
        sample: in an environment: draw actions instead of taking the most likely ones.
        video: film one episode into this file (.mp4, .gif, .mkv, .mov or .avi).
    """

    prompts: str | None = None
    episodes: int = 10
    seed: int = 20_000
    sample: bool = False
    video: str | None = None


def _eval(words: list[str]) -> int:
    path, rest = _positional(words, "eval", "a run folder")
    chosen = _parse(Eval, rest, "heeler eval RUN")
    verb = _verb(path)
    if verb == "ppo gym":
        return _eval_gym(path, chosen)
    if verb in ("sft", "reward"):
        raise HeelerError(
            f"heeler eval is for PPO runs, and {path} is one of heeler {verb}: its held-out figures are in"
            f" {path}/summary.json"
        )
    from heeler.runtime.runs import write_json
    from heeler.train.dialogue import load_dialogue_run
    from heeler.train.report import figures_table
    from heeler.train.text import load_text_run

    load = load_dialogue_run if verb == "ppo dialogue" else load_text_run
    run = load(path, eval_prompts=None if chosen.prompts is None else _rows(chosen.prompts))
    evaluation = run.evaluate(show=True)
    assert run.folder is not None
    write_json(run.folder.path / "eval.json", {"step": run.state.step, **evaluation.figures})
    print(figures_table({f"after update {run.state.step}": evaluation.figures}))
    return 0


def _eval_gym(path: str, chosen: Eval) -> int:
    from pathlib import Path

    from heeler.runtime.runs import write_json
    from heeler.train.control import LARGEST_SEED, load_actor_critic, load_policy
    from heeler.train.evaluate_control import check_film, evaluate_policy, record_video
    from heeler.train.run import at_least, at_most

    at_least({"--episodes": (chosen.episodes, 1), "--seed": (chosen.seed, 0)})
    at_most({"--seed": (chosen.seed, LARGEST_SEED)})
    policy, config = load_actor_critic(path)
    if chosen.video is not None:
        check_film(config.env, chosen.video)  # before the episodes are played
    _say_which_policy(path, config, "plays")
    deterministic = config.eval_deterministic and not chosen.sample
    figures = evaluate_policy(
        policy, config.env, episodes=chosen.episodes, deterministic=deterministic, seed=chosen.seed, show=True
    )
    write_json(Path(path) / "eval.json", figures)
    print(
        f"return {figures['reward']:.2f} ± {figures['reward/std']:.2f}, length {figures['length']:.1f}, over"
        f" {figures['episodes']:.0f} episodes, {'most likely' if deterministic else 'drawn'} actions"
    )
    if chosen.video is not None:
        acting = load_policy(path, deterministic=deterministic, seed=chosen.seed)
        frames = record_video(acting, config.env, chosen.video, seed=chosen.seed)
        print(f"{chosen.video}: {frames} frames")
    return 0


def _say_which_policy(path: str, config: Any, does: str) -> None:
    """Where it is not the last one of a finished run of an environment."""
    from pathlib import Path

    from heeler.train.control import last_update, policy_folder

    if (step := last_update(path)) is not None:
        print(f"{path} was stopped after update {step} of {config.updates}: its last checkpoint {does}")
    elif policy_folder(path) == Path(path) / "best" / "policy":
        print(f"{path} kept the best policy of its evaluations: it {does}")


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write an environment's policy as an ONNX file, observation statistics included, and check it.

    Attributes:
        onnx: the file.
        masked: give it an input for action masks.
    """

    onnx: str
    masked: bool = False


def _export(words: list[str]) -> int:
    path, rest = _positional(words, "export", "a run folder")
    chosen = _parse(Export, rest, "heeler export RUN")
    if (verb := _verb(path)) == "reward":
        raise HeelerError(f"{path} is a reward model: its folder model/ is the export; optimum makes ONNX of it")
    if verb != "ppo gym":
        raise HeelerError(f"{path} is a language model: its folder policy/ is the export; optimum makes ONNX of it")
    from heeler.train.control import load_actor_critic
    from heeler.train.onnx import export_onnx

    policy, config = load_actor_critic(path)
    _say_which_policy(path, config, "is exported")
    figures = export_onnx(policy, chosen.onnx, masked=chosen.masked)
    print(
        f"{chosen.onnx}: checked with onnxruntime on random observations, parameters differ by"
        f" {figures['parameters']:.1g} at most, {figures['equal_actions']:.0%} of the actions are equal"
    )
    return 0


def _rows(path: str) -> list[Any]:
    from heeler.data.tables import read_rows

    return read_rows(path)


@dataclass(frozen=True, kw_only=True)
class SampleCommand:
    """Sample completions.

    Attributes:
        prompt: a prompt; repeat the flag for more.
        max_new_tokens: length cap.
        temperature: of sampling; 0 takes the most likely tokens.
        top_k: draw from the k most likely tokens; 0 for all.
        top_p: draw from the fewest of the most likely tokens whose probabilities sum to at least p; 1 for
            all.
        seed: of the draws.
        chat: apply the model's chat template to each prompt.
    """

    prompt: tuple[str, ...]
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    chat: bool = False


def _sample(words: list[str]) -> int:
    path, rest = _positional(words, "sample", "a run folder, a model folder or a hub id")
    import tyro

    chosen = tyro.cli(
        tyro.conf.configure(tyro.conf.UseAppendAction)(SampleCommand), args=rest, prog="heeler sample RUN_OR_MODEL"
    )
    if not chosen.prompt:
        raise HeelerError("heeler sample needs at least one --prompt")
    from heeler.policies.loading import is_seq2seq
    from heeler.train.report import sample_model, stopped_run

    model = path
    if (stopped := stopped_run(path)) is not None:
        step, config = stopped
        model = config.model
        print(f"{path} was stopped after update {step} of {config.updates}: its last checkpoint samples")
    # neither a translation nor an answer goes on where the prompt ends
    between = " -> " if is_seq2seq(model) else "\n" if chosen.chat else ""
    for prompt, text in zip(chosen.prompt, sample_model(path, chosen), strict=True):
        print(f"{prompt}{between}\033[1m{text}\033[0m" if sys.stdout.isatty() else f"{prompt}{between}{text}")
    return 0


def _report(run: Any) -> None:
    from heeler.train.report import print_report

    print_report(run)


if __name__ == "__main__":
    sys.exit(main())
