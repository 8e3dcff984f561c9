"""Write the fixtures in tests/checkpoints/openai with TensorFlow's own saver, as OpenAI's released code names them.

    python -m venv tf && tf/bin/pip install tensorflow-cpu
    tf/bin/python tests/checkpoints/write_tensorflow.py tests/checkpoints/openai

The numbers are those of `values`, so that a test can make them again without TensorFlow; `tensorflow.json` says which
version wrote them. With `--full` the 124M shape (500 MB) is written in place of the small ones.
"""

import argparse
import json
import zlib
from pathlib import Path

import numpy as np

SMALL = {"n_vocab": 257, "n_ctx": 16, "n_embd": 8, "n_head": 2, "n_layer": 2}
FULL = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}


def shapes(hparams: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Every variable of OpenAI's model.py, in its names and shapes."""
    width = hparams["n_embd"]
    sizes: dict[str, tuple[int, ...]] = {
        "model/wpe": (hparams["n_ctx"], width),
        "model/wte": (hparams["n_vocab"], width),
    }
    for layer in range(hparams["n_layer"]):
        block = f"model/h{layer}"
        for name, n_in, n_out in (
            ("attn/c_attn", width, 3 * width),
            ("attn/c_proj", width, width),
            ("mlp/c_fc", width, 4 * width),
            ("mlp/c_proj", 4 * width, width),
        ):
            sizes |= {f"{block}/{name}/w": (1, n_in, n_out), f"{block}/{name}/b": (n_out,)}
        for name in ("ln_1", "ln_2"):
            sizes |= {f"{block}/{name}/g": (width,), f"{block}/{name}/b": (width,)}
    return sizes | {"model/ln_f/g": (width,), "model/ln_f/b": (width,)}


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """What a variable holds: numbers that depend on its name alone."""
    return (np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape) * 0.1).astype(np.float32)


def write(folder: Path, hparams: dict[str, int], *, sharded: bool = False, more: bool = False) -> None:
    """Save a model; ``sharded`` over two devices' files, with ``more`` variables than the model's."""
    import tensorflow as tf

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hparams.json").write_text(json.dumps(hparams, indent=2) + "\n")
    with tf.Graph().as_default(), tf.compat.v1.Session(config=tf.compat.v1.ConfigProto(device_count={"CPU": 2})) as run:
        variables = []
        for i, (name, shape) in enumerate(shapes(hparams).items()):
            with tf.device(f"/cpu:{i % 2}" if sharded else "/cpu:0"):
                variables.append(tf.compat.v1.Variable(values(name, shape), name=name))
        if more:
            variables.append(tf.compat.v1.Variable(np.int64(7), name="global_step"))
            variables.append(tf.compat.v1.Variable(np.array(["abc"], dtype=object), name="a_string"))
            variables.append(tf.compat.v1.Variable(np.ones(8, np.float32), name="model/ln_f/g/Adam"))
            variables.append(tf.compat.v1.Variable(np.float32(0.9), name="beta1_power"))
        run.run(tf.compat.v1.global_variables_initializer())
        saver = tf.compat.v1.train.Saver(variables, sharded=sharded)
        saver.save(run, str(folder / "model.ckpt"), write_meta_graph=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--full", action="store_true")
    arguments = parser.parse_args()
    if arguments.full:
        write(arguments.out, FULL)
    else:
        import tensorflow

        write(arguments.out / "plain", SMALL)
        write(arguments.out / "sharded", SMALL, sharded=True, more=True)
        about = {"tensorflow": tensorflow.__version__, "numpy": np.__version__}
        (arguments.out / "tensorflow.json").write_text(json.dumps(about, indent=2) + "\n")
