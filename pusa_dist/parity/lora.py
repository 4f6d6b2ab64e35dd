"""``lora``: weights after a Pusa LoRA, a step-distillation LoRA, or both were merged into them."""

import re
from collections.abc import Mapping

from torch import Tensor

from pusa_dist.checkpoint.keys import diffusers_name
from pusa_dist.checkpoint.lora import MergedLora, read_distill, read_pusa
from pusa_dist.checkpoint.transformer import build_transformer
from pusa_dist.config import Precision
from pusa_dist.parity.cases import Case
from pusa_dist.parity.verdict import Check, Report, Tolerance

SUBJECTS = ("fp32", "bf16")
PUSA, DISTILL = "pusa/", "lightx2v/"
"""Leading words of the tensors that make up either file."""

_MERGED = re.compile(
    r"merged_(?P<precision>fp32|bf16)\."
    r"(?P<recipe>pusa|(?:lightx2v(?P<no_alpha>_no_alpha_key)?)(?P<then>_then_pusa)?)/(?P<weight>.+)"
)


def check(case: Case) -> Report:
    """Compare every merged weight, and that no other weight changed."""
    tolerance = Tolerance.parse(case.description, SUBJECTS)
    recorded: dict[tuple[Precision, str], dict[str, str]] = {}
    for name in case.tensors:
        if match := _MERGED.fullmatch(name):
            precision: Precision = "bf16" if match["precision"] == "bf16" else "fp32"
            recorded.setdefault((precision, match["recipe"]), {})[diffusers_name(match["weight"])] = name
        elif not name.startswith((PUSA, DISTILL)):
            raise ValueError(f"tensor name {name!r} is not understood")
    checks: list[Check] = []
    for (precision, recipe), names in recorded.items():
        merged, untouched = _merge(case, precision, recipe)
        for weight, name in names.items():
            checks += tolerance.compare(name, merged[weight], case.tensors[name], precision)
        changed = sum(not merged[k].equal(w) for k, w in untouched.items() if k not in names)
        checks.append(Check("others_changed", f"{precision} {recipe}", float(changed), 0.0))
    return Report(checks)


def _merge(case: Case, precision: Precision, recipe: str) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """All weights after and before a recipe."""
    model = case.model()
    transformer = build_transformer(model, model.experts[0], device="cpu", precision=precision)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    distill = _file(case, DISTILL)
    if recipe.startswith("lightx2v_no_alpha_key"):
        distill = {key: tensor for key, tensor in distill.items() if not key.endswith(".alpha")}
    lora = MergedLora(
        transformer,
        read_pusa(_file(case, PUSA)) if recipe.endswith("pusa") else None,
        read_distill(distill) if recipe.startswith("lightx2v") else None,
    )
    if recipe.endswith("pusa"):
        lora.set_alpha(case.description["pusa_lora_alpha"])
    return transformer.state_dict(), before


def _file(case: Case, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in case.tensors.items() if name.startswith(prefix)}
