"""How many images were lost for which reason, and whether that is more than the budget allows."""

from litevae.errors import UserError


def check_budget(reasons: dict[str, int], budget: float, out: str, total: int, name: str = "error_budget") -> None:
    """
    Raises:
        UserError: more images are in quarantine than the budget, a field of this name, allows.
    """
    quarantined = sum(reasons.values())
    if quarantined > budget * total:
        raise UserError(
            f"{quarantined} of {total} images could not be encoded ({listed_reasons(reasons)}), more than {name}="
            f"{budget:g} allows; they are listed in {out}/quarantine. Mend them, or raise the budget and "
            f"run again: it goes on"
        )


def listed_reasons(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))


def add_reasons(total: dict[str, int], more: dict[str, int]) -> None:
    for key, count in more.items():
        total[key] = total.get(key, 0) + count
