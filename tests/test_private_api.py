"""Every private name of a dependency that src uses, with the reason, and a check of each.

A release may change these without notice: with a new version of a package, this file is the first
to look at. A private name that is used and not listed fails the last test.
"""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch
import transformers
import transformers.core_model_loading
from accelerate import Accelerator
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    Trainer,
)
from transformers.integrations import moe
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from trl import SFTTrainer

import lorakit
from lorakit.train.resumable_trainer import ResumableTrainer
from lorakit.train.trainer import LoraTrainer

SRC = Path(lorakit.__file__).parent

MODULES = {
    "torch._functorch.config": "an option of fake tensors for the memory plan",
    "torch._subclasses.fake_tensor": "tensors without data, for the memory plan",
    "torch.utils._python_dispatch": "sizes of all tensors that a pass makes, for the memory plan",
    "torch.utils._pytree": "the tensors among the results of an operation",
    "transformers.integrations.moe": "_default_apply_gate: experts whose gate ours computes",
    "transformers.utils.chat_template_utils": "_compile_jinja_template: the sandbox that renders",
}
NAMES = {
    "_C": "torch._C: if a driver is there, without starting CUDA",
    "_apply_gate": "what transformers' experts do between their two products",
    "_attn_implementation": "each class chooses its attention",
    "_call_impl": "torch.nn.Module: a call, compiled with its layer",
    "_compiled_call_impl": "torch.nn.Module: what a call runs instead, for compiled layers",
    "_default_apply_gate": "the gate of transformers' experts that have no other",
    "_dynamo": "torch._dynamo: which sizes compiled code may not fix, how often it is compiled",
    "_buffers": "torch.nn.Module: all tensors of a layer",
    "_cdata": "identity of a storage, for the memory plan",
    "_compile_jinja_template": "the chat template in transformers' environment",
    "_foreach_copy_": "one kernel for many tensors",
    "_foreach_mul_": "one kernel for many tensors",
    "_foreach_norm": "one kernel for many tensors",
    "_is_hf_initialized": "experts that the loader has quantized are not made at random",
    "_last_lr": "a resumed schedule's rate in the log",
    "_model_mapping": "the class that is built for a config",
    "_name_or_path": "the files of a model that a program loaded",
    "_no_split_modules": "classes of the layers that FSDP shards one by one",
    "_parameters": "torch.nn.Module: all tensors of a layer",
    "_register_custom_module": "PEFT's way to a layer of one's own, for adapters of experts",
    "_set_allocator_settings": "expandable segments after torch was imported",
    "_tokenizer": "added words of a tokenizer",
    "_weight_conversions": "hub names of renamed tensors",
}
# Methods of transformers' and TRL's trainers that are replaced, and their arguments.
METHODS = {
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_init_training_state": ["self", "max_steps"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_rng_state": ["self", "checkpoint"],
    "_load_scaler": ["self", "checkpoint"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_send_telemetry": ["self"],
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_there(name):
    importlib.import_module(name)


def test_names_are_there(tiny_model_dir):
    torch_names = ("_C", "_foreach_copy_", "_foreach_mul_", "_foreach_norm")
    assert all(hasattr(torch, name) for name in torch_names)
    assert hasattr(torch.cuda.memory, "_set_allocator_settings")
    layer = torch.nn.Linear(1, 1)
    assert set(layer._parameters) == {"weight", "bias"}
    assert layer._buffers == {}
    layer._compiled_call_impl = lambda x: x + layer._call_impl(x)
    assert layer(torch.ones(1, 1)) == 1 + layer._call_impl(torch.ones(1, 1))
    dynamo = importlib.import_module("torch._dynamo")
    assert dynamo.config.recompile_limit > 0
    assert callable(dynamo.maybe_mark_dynamic)
    assert callable(dynamo.mark_static)
    assert isinstance(torch.zeros(1).untyped_storage()._cdata, int)
    schedule = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(layer.parameters()), lambda _: 1.0)
    assert schedule._last_lr == schedule.get_last_lr()
    assert LlamaConfig in AutoModelForCausalLM._model_mapping
    config = PretrainedConfig(attn_implementation="eager")
    assert config._attn_implementation == "eager"
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert model.config._name_or_path == str(tiny_model_dir)
    assert set(model._no_split_modules) == {"LlamaDecoderLayer"}
    # `keep_steps_complete` replaces these on an instance.
    arguments = inspect.signature(Accelerator.prepare_model).parameters
    assert {"device_placement", "evaluation_mode"} <= set(arguments)
    assert "device_placement" in inspect.signature(Accelerator.prepare_data_loader).parameters
    assert Qwen3MoeExperts._apply_gate is moe._default_apply_gate
    settings = LoraConfig()
    settings._register_custom_module({torch.nn.Linear: torch.nn.Identity})
    assert settings._custom_modules == {torch.nn.Linear: torch.nn.Identity}
    assert "_is_hf_initialized" in inspect.getsource(transformers.core_model_loading)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    assert tokenizer._tokenizer.token_to_id(tokenizer.eos_token) == tokenizer.eos_token_id
    from transformers.utils.chat_template_utils import _compile_jinja_template

    assert _compile_jinja_template("{{ 1 + 1 }}").render() == "2"


@pytest.mark.parametrize("name", METHODS)
def test_replaced_methods_have_these_arguments(name):
    found = list(inspect.signature(getattr(SFTTrainer, name)).parameters)
    assert found[: len(METHODS[name])] == METHODS[name]


def test_no_other_method_of_a_trainer_is_replaced():
    own = {name for kind in (LoraTrainer, ResumableTrainer) for name in vars(kind)}
    private = {name for name in own if name.startswith("_") and not name.startswith("__")}
    assert {name for name in private if hasattr(SFTTrainer, name) or hasattr(Trainer, name)} == set(
        METHODS
    )


def uses():
    """(names that src defines, private names it reads of other objects, private modules)."""
    own, names, modules = set(), set(), set()
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                if of_self:
                    own.add(node.attr)
                elif not node.attr.startswith("__"):
                    names.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                own.add(node.target.id)
            elif isinstance(node, ast.ImportFrom) and not node.module.startswith("lorakit"):
                private = [each.name for each in node.names if each.name.startswith("_")]
                names.update(private)
                if "._" in node.module or private:
                    modules.add(node.module)
            elif isinstance(node, ast.Import):
                modules.update(each.name for each in node.names if "._" in each.name)
    return own, names, modules


def test_all_that_is_used_is_listed():
    own, names, modules = uses()
    standard = {"_exit", "_replace"}  # os._exit and namedtuple's, which are documented
    assert modules == set(MODULES)
    assert names - own - standard <= set(NAMES)
    assert set(NAMES) <= names
