"""Rules of backends that cannot do what the model asks of them, on any machine."""

from nemohybrid.config.rules.rule import RUN_RULES, Situation, rule
from nemohybrid.config.violation import Violation
from nemohybrid_kernels.names import BACKENDS, WITHOUT_SOFTCAP


@rule(RUN_RULES, "*")
def backend_of_capped_scores(now: Situation) -> Violation | None:
    """Not every implementation of attention can cap its scores."""
    backend, cap = now.config.kernels.attention_backend, now.config.model.attention.softcap
    if cap is None or backend not in WITHOUT_SOFTCAP:
        return None
    legal = ["auto", *(name for name in BACKENDS["attention"] if name not in WITHOUT_SOFTCAP)]
    where = f"kernels.attention_backend={backend}"
    return Violation(where, f"cannot train with model.attention.softcap={cap:g}", {"kernels.attention_backend": legal})


@rule(RUN_RULES, "M")
def parts_of_the_fused_mixer(now: Situation) -> Violation | None:
    """One operator has no parts of which one could be another's, and no room for norms between them."""
    kernels, model = now.config.kernels, now.config.model
    one = kernels.mixer_backend
    if one not in ("triton", "cpp"):
        return None
    parts = {f"kernels.{name}": getattr(kernels, name) for name in ("ssd_backend", "conv1d_backend", "norm_backend")}
    others = {key: value for key, value in parts.items() if value not in ("auto", one)}
    norms = [f"model.{name}" for name in ("mamba_bc_norm", "mamba_x_norm") if getattr(model, name)]
    if not others and not norms:
        return None
    apart = [*(f"{key}={value}" for key, value in others.items()), *(f"{key}=true" for key in norms)]
    legal = (
        {"kernels.mixer_backend": "auto, separate"}
        | dict.fromkeys(others, f"auto, {one}")
        | dict.fromkeys(norms, "false")
    )
    return Violation(f"kernels.mixer_backend={one}", f"is one operator, {' and '.join(apart)} part it", legal)
