"""Weights in 8 and 4 bit (torchao, bitsandbytes): they load, run and give what stock transformers gives with them.

On demand (``-m gpu``), with the packages installed: pip install torchao bitsandbytes (compiled by pip: torchao's source
raises a SyntaxWarning under Python 3.12 when it is compiled at import). Without a GPU it runs on the CPU.
"""

import pytest
import torch
from models import prompt, settings, tiny_config
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM, TorchAoConfig

import kvtier

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GREEDY = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def torchao(name):
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(getattr(quantization, name)())


def bitsandbytes(**bits):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **bits)


KINDS = {
    "torchao int8": lambda: torchao("Int8WeightOnlyConfig"),
    "bitsandbytes int8": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes fp4": lambda: bitsandbytes(load_in_4bit=True),
    "bitsandbytes nf4": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama in bfloat16, saved."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = tiny_config(hidden_size=256, intermediate_size=512, head_dim=64)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights(folder, kind):
    """The first logits agree as well as bfloat16 allows; with other chunks, or none, they do not."""
    config = KINDS[kind]()
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, device_map=DEVICE
    ).eval()
    ids = prompt(300).to(DEVICE)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY).logits[0].float()
    errors = []
    for select in (None, 0):
        with kvtier.offload(model, settings(select=select)) as kv:
            cache = kv.prefill(ids[:, :-1])
            assert kv._runtime.engine.shape.dtype == torch.bfloat16
            out = model.generate(ids, past_key_values=cache, attention_mask=torch.ones_like(ids), **GREEDY)
            assert cache.get_seq_length() == 307
        errors.append((out.logits[0].float() - expected).norm() / expected.norm())
    assert errors[0] < 0.05
    assert errors[1] > 0.25
    again = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY).logits[0].float()
    assert torch.equal(again, expected), "the model is not as before"
