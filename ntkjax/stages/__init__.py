"""The commands as functions over frozen config dataclasses. A new command is one file here and one line in COMMANDS."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ntkjax.stages import printing
from ntkjax.stages.adapting import Adaptation, AdaptConfig
from ntkjax.stages.adapting import adapt as _adapt
from ntkjax.stages.calling import takes_keywords
from ntkjax.stages.demonstrating import DemoConfig, Demonstration
from ntkjax.stages.demonstrating import demo as _demo
from ntkjax.stages.evaluating import EvaluateConfig
from ntkjax.stages.evaluating import evaluate as _evaluate
from ntkjax.stages.finetuning import FinetuneConfig
from ntkjax.stages.finetuning import finetune as _finetune
from ntkjax.stages.kernel_stability import Stability, StabilityConfig
from ntkjax.stages.kernel_stability import stability as _stability
from ntkjax.stages.replaying import ReplayConfig
from ntkjax.stages.replaying import replay as _replay
from ntkjax.stages.selecting import SelectConfig
from ntkjax.stages.selecting import select as _select
from ntkjax.stages.showing import ShowConfig, Shown
from ntkjax.stages.showing import describe as _describe
from ntkjax.stages.showing import show as _show
from ntkjax.stages.study_command import Study, StudyConfig
from ntkjax.stages.study_command import study as _study
from ntkjax.stages.verifying import Verification, VerifyConfig
from ntkjax.stages.verifying import verify as _verify

select = takes_keywords(SelectConfig)(_select)
finetune = takes_keywords(FinetuneConfig)(_finetune)
evaluate = takes_keywords(EvaluateConfig)(_evaluate)
adapt = takes_keywords(AdaptConfig)(_adapt)
demo = takes_keywords(DemoConfig)(_demo)
verify = takes_keywords(VerifyConfig)(_verify)
stability = takes_keywords(StabilityConfig)(_stability)
study = takes_keywords(StudyConfig)(_study)
show = takes_keywords(ShowConfig)(_show)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: its config (its flags), the stage, and the text it prints at the end."""

    config: type
    stage: Callable[..., Any]
    text: Callable[[Any, Any], str]

    def run(self, config: Any) -> tuple[str, int]:
        """Run the stage; what to print, and the exit code: 0 unless the result has one of its own."""
        result = self.stage(config)
        return self.text(config, result), getattr(result, "exit_code", 0)


_STAGES = {
    "select": Command(SelectConfig, select, printing.selection),
    "finetune": Command(FinetuneConfig, finetune, printing.finetuning),
    "evaluate": Command(EvaluateConfig, evaluate, printing.evaluation),
    "adapt": Command(AdaptConfig, adapt, printing.adaptation),
    "demo": Command(DemoConfig, demo, printing.demonstration),
    "verify": Command(VerifyConfig, verify, printing.verification),
    "stability": Command(StabilityConfig, stability, printing.stability),
    "study": Command(StudyConfig, study, printing.study),
}


@takes_keywords(ReplayConfig)
def replay(config: ReplayConfig, *, progress: bool = True) -> Any:
    """Repeat a run from its config.yaml into a directory of its own; gives what the stage gives."""
    return _replay(config, {name: (c.config, c.stage) for name, c in _STAGES.items()}, progress=progress)


COMMANDS = {
    **_STAGES,
    "show": Command(ShowConfig, show, _describe),
    "replay": Command(ReplayConfig, replay, printing.replayed),
}

__all__ = [
    "COMMANDS",
    "AdaptConfig",
    "Adaptation",
    "Command",
    "DemoConfig",
    "Demonstration",
    "EvaluateConfig",
    "FinetuneConfig",
    "ReplayConfig",
    "SelectConfig",
    "ShowConfig",
    "Shown",
    "Stability",
    "StabilityConfig",
    "Study",
    "StudyConfig",
    "Verification",
    "VerifyConfig",
    "adapt",
    "demo",
    "evaluate",
    "finetune",
    "replay",
    "select",
    "show",
    "stability",
    "study",
    "verify",
]
