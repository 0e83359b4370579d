"""Quantize fused experts while transformers loads them: one tensor in 16 bits at a time.

transformers' loader for bitsandbytes quantizes linear layers as they are read. This one also takes
the raw expert tensors, and dequantizes MXFP4 experts (gpt-oss) on the way: each tensor is read,
dequantized, quantized to NF4 and released before the next one.
"""

from __future__ import annotations

from typing import Any

from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationMethod

from lorakit.model.grouped_experts import GroupedExperts, group_experts, release_experts

METHOD = "lorakit_nf4"


class Nf4Config(BitsAndBytesConfig):
    """bitsandbytes' settings, which choose `Nf4Loader`.

    Args:
        mxfp4: the stored experts are MXFP4.
    """

    def __init__(self, mxfp4: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self.quant_method: Any = METHOD  # until the loader has been chosen
        self.mxfp4 = mxfp4


@register_quantizer(METHOD)
class Nf4Loader(Bnb4BitHfQuantizer):
    """The loader of `method: qlora`: linear layers as bitsandbytes', experts as `Nf4Experts`."""

    def __init__(self, quantization_config: Any, **more: Any) -> None:
        super().__init__(quantization_config, **more)
        quantization_config.quant_method = QuantizationMethod.BITS_AND_BYTES

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **more: Any) -> Any:
        super()._process_model_before_weight_loading(model, device_map=device_map, **more)
        group_experts(model, self.quantization_config.bnb_4bit_compute_dtype)
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **more: Any) -> bool:
        """True for the weights of linear layers and of experts."""
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, GroupedExperts):
            return name in module.expert_shapes
        return bool(super().param_needs_quantization(model, param_name, **more))

    def get_quantize_ops(self) -> Any:
        """The operation that quantizes a tensor."""
        return _Quantize(super().get_quantize_ops())

    def get_weight_conversions(self) -> list[Any]:
        """Tensors that become one: blocks and scales of MXFP4 experts."""
        if not self.quantization_config.mxfp4:
            return list(super().get_weight_conversions())
        names = ("gate_up_proj", "down_proj")
        return [
            WeightConverter([f"{name}_blocks", f"{name}_scales"], name, [_FromMxfp4()])
            for name in names
        ]

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        release_experts(model)
        return super()._dequantize(model, dtype=dtype)


class _Quantize(ConversionOps):
    """Quantize the weight of an experts module, or of a linear layer by bitsandbytes' operation."""

    def __init__(self, linear: Any) -> None:
        self.linear = linear

    def convert(self, input_dict: dict[str, Any], model: Any = None, **more: Any) -> dict[str, Any]:
        """Replace each tensor by its quantized parameter."""
        result: dict[str, Any] = {}
        for full_name, value in input_dict.items():
            module: Any
            module, name = get_module_from_name(model, full_name)
            if not isinstance(module, GroupedExperts):
                result |= self.linear.convert({full_name: value}, model=model, **more)
                continue
            weights = value[0] if isinstance(value, list) else value
            result[full_name] = module.quantize_(name, weights)
            loaded: Any = module
            loaded._is_hf_initialized = True
        return result


class _FromMxfp4(ConversionOps):
    """Dequantize MXFP4 blocks and scales to the dtype of the parameter they load into."""

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **_: Any
    ) -> dict[str, Any]:
        """Return the dense tensor [E, in, out] under the parameter's name."""
        import torch
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        values = {n: v[0] if isinstance(v, list) else v for n, v in input_dict.items()}
        # The loader casts to the model's dtype; bytes are exact in all of them.
        blocks = next(v for n, v in values.items() if n.endswith("_blocks")).to(torch.uint8)
        scales = next(v for n, v in values.items() if n.endswith("_scales")).to(torch.uint8)
        module, name = get_module_from_name(model, full_layer_name)
        dense = convert_moe_packed_tensors(blocks, scales, dtype=getattr(module, name).dtype)
        return {full_layer_name: dense}
