"""Train a reference model and write it with its provenance and its calibration and test inputs.

python -m models.train {digits_mlp,multitask_sparse,multitask_dense} [--output MODEL.onnx]
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from models import digits_mlp, multitask
from models.data import SPLIT_SEED, TASKS, TaskData, load_multitask_data, load_task_data
from models.metrics import task_accuracy
from models.provenance import environment, nonzero_structure
from onnx_decompose.exporter import export

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from models.data import Split
    from models.mlp import MLP
    from onnx_decompose.records.init_recorder import InitRecorder

SCALING = {
    "digits": "pixels / 16",
    "others": "standardized with the training split's mean and standard deviation",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """How one reference model is made.

    Attributes:
        training: the hyperparameters, a dataclass.
        train: from them the trained model and its initialization.
        tasks: the data sets, of ``TASKS``.
    """

    training: Any
    train: Callable[[Any], tuple[MLP, InitRecorder]]
    tasks: tuple[str, ...]

    def data(self) -> TaskData:
        """The splits, in the model's layout."""
        return load_multitask_data() if len(self.tasks) > 1 else load_task_data(*self.tasks)


RECIPES = {
    "digits_mlp": Recipe(digits_mlp.DigitsTraining(), digits_mlp.train, ("digits",)),
    "multitask_sparse": Recipe(multitask.SparseTraining(), multitask.train_sparse, TASKS),
    "multitask_dense": Recipe(multitask.DenseTraining(), multitask.train_dense, TASKS),
}


def main() -> None:
    """Train one model; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m models.train", description=__doc__)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--output", type=Path, help="default: NAME.onnx beside this script")
    parser.add_argument("--snapshot", type=Path, help="also write the initial weights here")
    arguments = parser.parse_args()
    output = arguments.output or Path(__file__).with_name(f"{arguments.name}.onnx")
    recipe = RECIPES[arguments.name]

    torch.set_num_threads(1)  # the order of summation, and so the weights, depend on it
    torch.use_deterministic_algorithms(mode=True)
    began = time.process_time()  # of one thread: what else the machine does hardly matters
    model, recorder = recipe.train(recipe.training)
    seconds = time.process_time() - began

    data = recipe.data()
    example = torch.from_numpy(data.test.inputs[:2])
    export(
        model,
        (example,),
        output,
        input_names=["input"],
        output_names=["logits"],
        dynamic_shapes={"input": {0: torch.export.Dim("batch")}},
        recorder=recorder,
    )
    if arguments.snapshot:
        recorder.save_snapshot(arguments.snapshot)
    for suffix, split in (("calibration", data.calibration), ("inputs", data.test)):
        np.savez_compressed(
            output.with_name(f"{output.stem}_{suffix}.npz"),
            allow_pickle=False,
            **arrays(split, len(recipe.tasks)),
        )
    provenance = describe(model, recipe, data)
    provenance["training_cpu_seconds"] = round(seconds, 1)
    provenance["sha256"] = hashlib.sha256(output.read_bytes()).hexdigest()
    text = json.dumps({"name": arguments.name, **provenance}, indent=2)
    output.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    print(text)


def arrays(split: Split, tasks: int) -> dict[str, NDArray[Any]]:
    """A split as the command line takes it: the model's input, then what the metric needs."""
    found: dict[str, NDArray[Any]] = {"input": split.inputs, "labels": split.labels}
    return found | {"task": split.task} if tasks > 1 else found


def describe(model: MLP, recipe: Recipe, data: TaskData) -> dict[str, Any]:
    """Data, hyperparameters, versions, accuracy per task and the structure of the weights."""
    splits = {"calibration": data.calibration, "test": data.test}
    with torch.no_grad():
        logits = {k: model(torch.from_numpy(v.inputs)).numpy() for k, v in splits.items()}
    scores = {
        k: task_accuracy(arrays(v, len(recipe.tasks)), {"logits": logits[k]})
        for k, v in splits.items()
    }
    weights = [layer.weight.detach().numpy().T for layer in model.linear()]
    return {
        "data": {
            "sets": [f"sklearn.datasets.load_{task}" for task in recipe.tasks],
            "samples": {
                part.name: len(getattr(data, part.name).labels)
                for part in dataclasses.fields(data)
            },
            "split_seed": SPLIT_SEED,
            "scaling": SCALING,
            "inputs_constant_in_training": int((np.ptp(data.train.inputs, axis=0) == 0).sum()),
        },
        "training": {
            "script": f"models.{recipe.train.__module__.rsplit('.', 1)[-1]}",
            **dataclasses.asdict(recipe.training),
        },
        "environment": environment(),
        "widths": [weights[0].shape[0], *(weight.shape[1] for weight in weights)],
        **nonzero_structure(weights),
        "accuracy": {
            split: {task: round(value, 4) for task, value in found.items()}
            for split, found in scores.items()
        },
    }


if __name__ == "__main__":
    main()
