"""Cut the published reference vectors down to the fixtures in tests/data.

GMEM_GOLDEN=FOLDER python -m tools.cut_golden
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parents[1] / "tests" / "data"
WHOLE = ("transport_plan", "transport_odetimes", "transport_tsample", "transport_ode", "transport_sde")
SIZES = ("S-1", "B-1", "B-2", "XL-1")
HEAD = 64
"""Numbers of a tensor after three optimizer steps that are kept."""


def cut_transport(golden: Path) -> None:
    """Copy what is small; of the SDE's noise only what 50 points use, of its runs those."""
    for name in WHOLE:
        vectors = load_file(golden / f"{name}.safetensors")
        if name == "transport_sde":
            vectors["noise.seed99"] = vectors["noise.seed99"][:49]
            vectors = {key: value for key, value in vectors.items() if not key.endswith(".n250")}
        save_file({key: value.contiguous() for key, value in vectors.items()}, DATA / f"{name}.safetensors")
        if (golden / f"{name}.json").exists():
            facts = json.loads((golden / f"{name}.json").read_text())
            runs = [run for run in facts["runs"] if run["num_steps"] < 250]
            (DATA / f"{name}.json").write_text(json.dumps({"runs": runs}, indent=0))


def first_weights(vectors: dict[str, torch.Tensor], decay: float = 0.9999) -> dict[str, torch.Tensor]:
    """Return the weights before the first step, recovered from the averaged weights.

    The tensors "state0" are equal to "state3": they were changed by the optimizer after they were noted. With a the decay and
    s_k the weights after k steps, ema3 = a³s_0 + (1−a)(a²s_1 + a·s_2 + s_3), and s_1 and s_2 lie between s_0 and s_3: taking
    them at a third and two thirds of the way is wrong by about 1e-4 of a step, that is 1e-8.
    """
    share = (1 - decay) * (decay**2 / 3 + 2 * decay / 3 + 1)
    found = {}
    for name in [name for name in vectors if name.startswith("state0.")]:
        last = vectors[name.replace("state0.", "state3.")].double()
        average = vectors[name.replace("state0.", "ema3.")].double()
        found[name] = ((average - share * last) / (1 - share)).float()
    return found


def cut_training(golden: Path) -> None:
    """Keep the inputs whole, in parts below 1 MB, and the first numbers of every result."""
    vectors = load_file(golden / "trainstep.safetensors")
    vectors |= first_weights(vectors)
    start = sorted(name for name in vectors if name.startswith("state0."))
    tokens = {name: vectors[name] for name in vectors if name.startswith("in.")}
    results = {
        name: value.flatten()[:HEAD].clone()
        for name, value in vectors.items()
        if name.startswith(("grad_clipped.", "state3.", "ema3.", "head8::", "norm::", "loss.", "pred"))
    }
    half = len(start) // 2 - 4
    parts = {"weights_a": start[:half], "weights_b": start[half:]}
    for part, names in parts.items():
        save_file({name: vectors[name] for name in names}, DATA / f"trainstep_{part}.safetensors")
    save_file(tokens, DATA / "trainstep_inputs.safetensors")
    save_file(results, DATA / "trainstep_results.safetensors")
    shutil.copyfile(golden / "trainstep.json", DATA / "trainstep.json")


def cut_training_outputs(golden: Path) -> None:
    """Keep what the small model gives in training; its weights and inputs stand in lightningdit_patch2.safetensors."""
    vectors = load_file(golden / "lightningdit_patch2.safetensors")
    kept = {name: value for name, value in vectors.items() if name.startswith(("train_", "inter."))}
    save_file(kept, DATA / "lightningdit_patch2_training.safetensors")


def cut_sizes(golden: Path) -> None:
    """Write names and shapes of every tensor, and the counts."""
    summary = json.loads((golden / "statedict_summary.json").read_text())
    record = {}
    for size in SIZES:
        entries = json.loads((golden / f"statedict_{size}.json").read_text())
        record[size] = {
            "tensors": {entry["key"]: entry["shape"] for entry in entries},
            "trained": summary[size]["params_trainable"],
            "projection_head": summary[size]["projector_params_train_only"],
        }
    (DATA / "published_tensors.json").write_text(json.dumps(record, separators=(",", ":")))


def main() -> int:
    """Write the fixtures."""
    folder = os.environ.get("GMEM_GOLDEN")
    if not folder:
        print("set GMEM_GOLDEN to the folder of the reference vectors", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    for cut in (cut_transport, cut_training, cut_training_outputs, cut_sizes):
        cut(Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
