"""llama.cpp's side of benchmarks/kernels/decode.py, run by it in an environment that has llama-cpp-python, no effjax.

Reads one job a line from stdin and answers each with one line of JSON on stdout; what the library prints goes to
stderr. The first line it writes says which version it is and which instructions it was built for. A job is a JSON
object:

    model    GGUF file; loaded once, for as long as jobs name the same one
    threads  threads for prompts and for single tokens
    prompt   token ids
    new      tokens to decode after the first, the likeliest each time
    logits   .npy file for the logits behind the prompt, or null

The answer has the seconds of the prompt (its first token chosen) and of the other tokens, and the tokens.
"""

import json
import os
import sys
import time
from typing import Any

_ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # the library prints while it loads, and must not get between the answers

import llama_cpp  # noqa: E402
import numpy as np  # noqa: E402


class Loaded:
    """A model and a context that is emptied between jobs."""

    def __init__(self, path: str, threads: int, slots: int) -> None:
        self.key = (path, threads, slots)
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), options)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = slots, slots, min(slots, 512)
        context.n_threads = context.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot make a context of {slots} slots for {path}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def step(self, tokens: list[int]) -> np.ndarray:
        """The logits behind `tokens`, float32 [vocab]; valid until the next step."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        code = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens)))
        if code:
            raise RuntimeError(f"llama_decode of {len(tokens)} tokens returned {code}")
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), (self.vocab,))

    def generate(self, prompt: list[int], new: int, logits: str | None) -> dict[str, Any]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        began = time.perf_counter()
        found = self.step(prompt)
        tokens = [int(found.argmax())]
        first = time.perf_counter()
        if logits is not None:
            np.save(logits, found)
        resumed = time.perf_counter()
        for _ in range(new):
            tokens.append(int(self.step(tokens[-1:]).argmax()))
        return {"first_token_s": first - began, "decode_s": time.perf_counter() - resumed, "tokens": tokens}


def main() -> None:
    llama_cpp.llama_backend_init()
    system = llama_cpp.llama_print_system_info().decode()
    print(json.dumps({"version": llama_cpp.__version__, "system": system}), file=_ANSWERS)
    loaded: Loaded | None = None
    for line in sys.stdin:
        job = json.loads(line)
        key = (job["model"], job["threads"], len(job["prompt"]) + job["new"] + 1)
        if loaded is None or loaded.key != key:
            loaded = Loaded(*key)
        print(json.dumps(loaded.generate(job["prompt"], job["new"], job["logits"])), file=_ANSWERS)


if __name__ == "__main__":
    main()
