"""llm-compressor's side of weight_quant.py, run by that file in an environment that has llm-compressor and no effjax.

Reads one job a line from stdin and answers each with one line of JSON on stdout; what the library prints goes to
stderr. A job is a JSON object:

    model    directory in Hugging Face's layout
    tokens   .npy file, int32 [windows, length], the calibration set
    recipe   keyword arguments of GPTQModifier
    batch    windows that run at once
    threads  threads torch may use
    save     directory for the packed checkpoint, or null
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

_STARTED = time.perf_counter()
_ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # the library prints from its import on, and must not get between the answers
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import compressed_tensors  # noqa: E402
import llmcompressor  # noqa: E402
import llmcompressor.modifiers.gptq.base as gptq_base  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from llmcompressor.entrypoints.oneshot import Oneshot  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from loguru import logger  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402


@contextlib.contextmanager
def solver_clock() -> Iterator[list[tuple[float, float]]]:
    """Wall and processor seconds of every call of the solver: factor and sweep of one matrix, nothing of the model."""
    original, seconds = gptq_base.quantize_weight, []

    def timed(*args: Any, **kwargs: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = original(*args, **kwargs)
        seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
        return result

    gptq_base.quantize_weight = timed
    try:
        yield seconds
    finally:
        gptq_base.quantize_weight = original


def loader(tokens: np.ndarray, batch: int) -> torch.utils.data.DataLoader:
    """The windows in their order, none dropped, none padded."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    return torch.utils.data.DataLoader(rows, batch_size=batch, shuffle=False)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Loads the model, calibrates and compresses it, and saves it where the job says so."""
    torch.set_num_threads(job["threads"])
    start = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    # Tokens come ready made; the library wants some tokenizer all the same.
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"": 0}, "")))
    batches = loader(np.load(job["tokens"]), job["batch"])
    task = Oneshot(
        model=model,
        processor=tokenizer,
        recipe=GPTQModifier(**job["recipe"]),
        dataset=batches,
        pipeline="sequential",
    )
    loaded, processor = time.perf_counter(), time.process_time()
    with solver_clock() as solver:
        task.apply_recipe_modifiers(calibration_dataloader=batches)
    compressed, busy = time.perf_counter(), time.process_time() - processor
    if job["save"] is not None:
        task.model.save_pretrained(job["save"], save_compressed=True)
    return {
        "load_s": loaded - start,
        "compress_s": compressed - loaded,
        "compress_cpu_s": busy,
        "solver_s": sum(wall for wall, _ in solver),
        "solver_cpu_s": sum(cpu for _, cpu in solver),
        "matrices": len(solver),
        "save_s": time.perf_counter() - compressed,
    }


def main() -> None:
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    versions = {
        "llmcompressor": llmcompressor.__version__,
        "compressed_tensors": compressed_tensors.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps({"import_s": time.perf_counter() - _STARTED, "versions": versions}), file=_ANSWERS)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=_ANSWERS)


if __name__ == "__main__":
    main()
