"""``pyrovae evaluate``: log p(x) of a split of a run."""

import argparse

from pyrovae import comparison, export, processes, quadrature
from pyrovae import config as cfg
from pyrovae.cli import settings
from pyrovae.commands.info import count
from pyrovae.commands.output import new_file, progress, say, show
from pyrovae.errors import InputError
from pyrovae.evaluation import evaluate as run_evaluation
from pyrovae.proposals import Proposal
from pyrovae.runs import Run
from pyrovae.settings import EvaluateConfig
from pyrovae.training import resolve_device


def evaluate(args: argparse.Namespace) -> int:
    """``pyrovae evaluate``: by importance sampling, or by quadrature."""
    given = settings(args, EvaluateConfig)
    config = cfg.resolve_evaluation(given)
    proposal = Proposal(config.proposal, config.proposal_scale)
    _check_export(args.export, config, given)
    with processes.joined(config.device):
        args.quiet = args.quiet or not processes.is_first()
        return _evaluate(args, config, proposal)


def _evaluate(args: argparse.Namespace, config: EvaluateConfig, proposal: Proposal) -> int:
    device = processes.local_device(resolve_device(config.device))
    run = Run(args.run)
    vae = cfg.load(run, device=str(device))
    split = comparison.run_split(
        run, config.split, limit=config.limit, seed=config.seed, data_root=config.data_root
    )
    with progress("image", args.quiet) as report:

        def told(done: int) -> None:
            report("evaluate", done, len(split))

        if config.method == "quadrature":
            truth = quadrature.evaluate(vae, split, tolerance=config.tolerance, progress=told)
            if processes.is_first():
                show(truth.to_dict() if args.json else str(truth))
            return 0
        result = run_evaluation(
            vae,
            split,
            config.num_particles,
            seed=config.seed,
            proposal=proposal,
            information_images=config.information,
            engine=config.engine,
            precision=config.precision,
            progress=told,
        )
    if not processes.is_first():
        return 0
    comparison.keep(run, result, limit=config.limit, parameters=count(vae))
    show(result.to_dict() if args.json else str(result))
    if args.export is not None:
        written = export.export(
            args.export, vae, split, result, max_draws=config.max_draws, proposal=proposal
        )
        say(f"written   {written}", args.quiet)
    return 0


def _check_export(path: str | None, config: EvaluateConfig, given: dict[str, object]) -> None:
    if path is None:
        if "max_draws" in given:
            raise InputError("--max-draws has no use without --export FILE.nc; leave it out")
        return
    if config.method == "quadrature":
        raise InputError("--export writes draws, and quadrature has none; use --method importance")
    new_file(path, "--export", ".nc")
    export.check_target(path)
