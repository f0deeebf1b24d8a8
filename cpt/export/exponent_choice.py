"""Which exponent rule an MXFP4 export uses: that of training, if training rounded its experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cpt.checkpoint.manifest import Manifest
from cpt.checkpoint.run_state import RunState, quantized_by
from cpt.config.precision_sections import ExponentRule
from cpt.errors import ConfigError

DEFAULT_RULE: ExponentRule = "floor"
ACCEPT_OPTION = "--accept_rule_change"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExponentChoice:
    """The rule of an export, and whether its values are those that were trained."""

    rule: ExponentRule = DEFAULT_RULE
    """The rule of the export."""
    trained: ExponentRule | None = None
    """The rule by which training rounded when the checkpoint was saved; None if it did not."""
    from_step: int | None = None
    """Optimizer steps after which training began to round; None if it did not, or does not say."""

    @property
    def writes_what_was_trained(self) -> bool:
        """Whether the exported values are those of the last forward pass, if they are finite.

        Training computes with decode(encode(bf16(master weights))), which the export holds. Frozen
        matrices are not rounded in training: theirs are the same if rounding changes nothing.
        """
        return self.trained == self.rule

    def to_json(self) -> dict[str, Any]:
        """Return what the report says of it."""
        plain: dict[str, Any] = {"exponent": self.rule}
        if self.trained is not None:
            plain["quantized_training"] = {"from_step": self.from_step, "rule": self.trained}
        return plain


def choose_exponent(
    manifest: Manifest, asked: ExponentRule | None, *, is_change_accepted: bool = False
) -> ExponentChoice:
    """Return the rule of an export.

    Args:
        manifest: The manifest of the checkpoint.
        asked: What the user asked for (`--exponent`); None for the default.
        is_change_accepted: Whether it may be another rule than that of training.

    Raises:
        ConfigError: it is another rule than that of training.
    """
    trained = quantized_by(manifest)
    if trained is None:
        return ExponentChoice(rule=asked or DEFAULT_RULE)
    train = (RunState.of(manifest).config or {}).get("train") or {}
    from_step = (train.get("quantize") or {}).get("start_step")
    if asked not in (None, trained) and not is_change_accepted:
        raise ConfigError(
            f"--exponent {asked}: the run has trained with experts that are rounded by the rule "
            f"{trained} (train.quantize) since step {from_step}, and with another rule the export "
            f"is not the model that was trained. Leave --exponent out, or give {ACCEPT_OPTION}."
        )
    return ExponentChoice(rule=asked or trained, trained=trained, from_step=from_step)
