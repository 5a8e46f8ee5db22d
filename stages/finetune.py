"""Train the uppermost blocks of a backbone together with the tuned head of one task (`task` in params.yaml).

A run that was interrupted continues from its last epoch. (Its state lies in .finetuning/ until it is done.)
The networks are trained by TensorFlow, so the outs have the same bytes only on processors of one kind.
"""

import shutil
import sys
from pathlib import Path

from aplsmear.compute.runtime import start_tensorflow
from aplsmear.files import hold
from aplsmear.finetune.explain import examples, write_explanations
from aplsmear.finetune.finetuning import Trained, build_trainers, finetune, finetune_key, with_weights
from aplsmear.finetune.inputs import read_inputs, read_starts
from aplsmear.finetune.results import conclude, log_runs
from aplsmear.finetune.training import check_precision
from aplsmear.params import read_params
from aplsmear.progress import progress
from aplsmear.runs.stage import home, origin, run
from aplsmear.runs.tracking import Tracker
from aplsmear.tables import read_table


def main() -> None:
    params = read_params(Path("params.yaml"))
    task, settings, seed, threads = params.task, params.finetune, params.seed, params.compute.threads
    start_tensorflow(threads)
    check_precision(settings.precision)
    tune, brightness = params.tune_of(task), params.augment.brightness
    inputs = read_inputs(params.tasks[task], settings, tune, params.backbones, brightness, seed)
    tuned, out = Path(f"tuned/{task}"), Path("finetuned")
    starts = read_starts(tuned, settings)

    key = f"{task}-{finetune_key(inputs, starts, threads)}"
    folder = home() / ".finetuning" / key
    # Two experiments may need the same training at once: the second waits.
    with hold(folder.with_suffix(".lock")):
        logged = {"seed": seed} | settings.model_dump()
        tracker = Tracker(home(), f"finetune {task}", key, origin("finetune", task), logged)
        trainers = build_trainers(inputs, starts, folder)
        running = progress(finetune(inputs, starts, trainers, folder), "epochs", note=note)
        trained = list({each.run: each for each in running}.values())
        log_runs(tracker, trained)

        frozen = read_table(tuned / "predictions.csv")
        results = conclude(inputs, trainers, trained, task, frozen, params.combine.resamples)
        model = with_weights(trainers, trained[-1]).network.whole
        results.write(out, model)
        if settings.log_model:
            tracker.log_model(model)
        chosen = examples(results.predictions, settings.pictures)
        write_explanations(trainers, trained, chosen, inputs.views, out / "explanations", task)
        if settings.log_images:
            tracker.log_pictures(out / "explanations")
        tracker.close({}, {name: results.metrics[name]["value"] for name in ("auroc", "difference")})
        shutil.rmtree(folder)
    print(results.summary(sum(each.history.seconds for each in trained) / 60), file=sys.stderr)


def note(trained: Trained) -> str:
    """The text beside the progress bar: the run, and its last AUROC."""
    judged = trained.history.auroc
    return trained.run.name + (f" AUROC {judged[-1]:.3f}" if judged else "")


if __name__ == "__main__":
    run(main)
