"""Search settings in ranges with Optuna's TPE sampler.

Optuna proposes, and lorakit trains and keeps the results. Each proposal is computed from the
finished configurations and the number of the next one alone, so a resumed search proposes what an
uninterrupted one would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.errors import DependencyError
from lorakit.sweeps.variations import Range, Varied

INSTALL = "pip install 'lorakit[sweep]'"
# Proposals at random before the sampler has enough results to fit.
RANDOM_TRIALS = 6
# Proposals for a configuration that was not tried before.
ATTEMPTS = 32


def require_optuna() -> None:
    """Check that Optuna is installed.

    Raises:
        DependencyError: it is not.
    """
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise DependencyError("--trials needs Optuna, which is not installed", INSTALL) from error


def propose(
    vary: Mapping[str, Varied],
    results: Sequence[tuple[Mapping[str, Any], float]],
    seed: int,
) -> dict[str, Any] | None:
    """Propose the settings of the next configuration; None if no new one was found.

    Args:
        results: settings and held-out loss of all earlier configurations, in their order; infinite
            for failed ones.
        seed: of the recipe.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for attempt in range(ATTEMPTS):
        number = (seed + 1_000_003 * len(results) + 7_919 * attempt) % 2**32
        settings = _proposal(optuna, vary, results, number)
        if all(settings != earlier for earlier, _ in results):
            return settings
    return None


def _proposal(
    optuna: Any,
    vary: Mapping[str, Varied],
    results: Sequence[tuple[Mapping[str, Any], float]],
    seed: int,
) -> dict[str, Any]:
    spaces = {key: _space(optuna, values) for key, values in vary.items()}
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=RANDOM_TRIALS)
    study = optuna.create_study(sampler=sampler, direction="minimize")
    for settings, loss in results:
        finite = math.isfinite(loss)
        study.add_trial(
            optuna.trial.create_trial(
                state=getattr(optuna.trial.TrialState, "COMPLETE" if finite else "FAIL"),
                params={key: _to_space(vary[key], value) for key, value in settings.items()},
                distributions=spaces,
                value=loss if finite else None,
            )
        )
    trial = study.ask(spaces)
    return {key: _from_space(values, trial.params[key]) for key, values in vary.items()}


def _space(optuna: Any, values: Varied) -> Any:
    """The distribution of a key; listed values are chosen by their number."""
    kinds = optuna.distributions
    if not isinstance(values, Range):
        return kinds.CategoricalDistribution(list(range(len(values))))
    if values.whole:
        return kinds.IntDistribution(int(values.low), int(values.high))
    return kinds.FloatDistribution(values.low, values.high, log=values.log)


def _to_space(values: Varied, value: Any) -> Any:
    return value if isinstance(values, Range) else list(values).index(value)


def _from_space(values: Varied, found: Any) -> Any:
    return found if isinstance(values, Range) else values[found]
