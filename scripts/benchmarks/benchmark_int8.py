"""OpenVINO in 8 bits as a contender of `benchmark.py`: its UNet quantised after training, by NNCF."""

from dataclasses import replace
from pathlib import Path

from benchmark_contender import INT8, Options
from benchmark_openvino import OpenVINO, save_whole

CALIBRATION_STEPS = 3  # of one guided run; the UNet's inputs in it set the ranges of the activations
CALIBRATION_SIZE = 512


class OpenVINOInt8(OpenVINO):
    """The UNet with weights and activations of 8 bits, what stays of it and the others as in `openvino`."""

    own_precision = INT8
    unet = "unet-int8"


class Observed(OpenVINO):
    """Keeps what its UNet is given."""

    def prepare(self, width: int, height: int, batch_size: int) -> None:
        self.seen: list[tuple] = []
        super().prepare(width, height, batch_size)

    def predict(self, x, timestep, context, vector=()):
        self.seen.append(tuple(each.numpy() for each in (x, timestep, context, *vector)))
        return super().predict(x, timestep, context, vector)


def quantize_for_openvino(options: Options, target: Path) -> None:
    """Write the UNet in 8 bits, as OpenVINO's own examples for Stable Diffusion do it.

    For transformers, NNCF balances activations and weights first (SmoothQuant) and leaves attention alone. The
    correction of biases is off: the examples have it off, too, for it takes long and changes little.
    """
    import nncf
    import openvino

    observed = Observed(replace(options, precision="fp32"))
    observed.imports()
    observed.load()
    observed.prepare(CALIBRATION_SIZE, CALIBRATION_SIZE, 1)
    observed.denoised(CALIBRATION_STEPS)
    seen = observed.seen
    del observed
    quantized = nncf.quantize(
        openvino.Core().read_model(Path(options.openvino) / "unet.xml"),
        nncf.Dataset(seen),
        subset_size=len(seen),
        model_type=nncf.ModelType.TRANSFORMER,
        advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
    )
    save_whole(quantized, target)
