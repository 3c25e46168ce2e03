"""Few steps in OpenVINO as FastSD CPU takes them: a contender of `benchmark.py`."""

from pathlib import Path

from benchmark_contender import FEW, SEED, Options
from benchmark_int8 import OpenVINOInt8
from benchmark_openvino import OpenVINO, save_whole


class FastSD(OpenVINO):
    """The same networks with FastSD CPU's settings: LCM, guidance 1, a tiny VAE, compiled for one size.

    FastSD CPU hands its models to a pipeline that runs them in OpenVINO, one prediction per step, each network in the
    precision that OpenVINO prefers; here, in that of `--precision`.
    """

    way = FEW
    decoder = "tiny_vae_decoder"

    @classmethod
    def files(cls, options: Options) -> list[str]:
        return [options.tiny_vae, *super().files(options)]

    def imports(self) -> None:
        super().imports()
        from diffusers import LCMScheduler

        self.scheduler_class = LCMScheduler

    def load(self) -> None:
        super().load()
        self.scale = 1  # a tiny VAE decodes the UNet's latents as they are

    def begin(self, steps: int) -> None:
        super().begin(steps)
        self.generators = [self.torch.Generator().manual_seed(SEED + i) for i in range(self.batch_size)]
        for generator in self.generators:
            self.torch.randn(self.noise[0].shape, generator=generator)  # the first noise, which is drawn already

    def step(self) -> None:
        timestep = next(self.timesteps, None)
        if timestep is None:
            self.begin(self.way.endless)
            timestep = next(self.timesteps)
        eps = self.predict(self.latest, timestep, *self.context)
        self.latest, _ = self.scheduler.step(eps, timestep, self.latest, generator=self.generators, return_dict=False)


class FastSDInt8(FastSD):
    """The same with the UNet in 8 bits."""

    own_precision = OpenVINOInt8.own_precision
    unet = OpenVINOInt8.unet


def export_tiny_vae(options: Options, target: Path) -> None:
    """Write the decoder of a tiny VAE in OpenVINO's form, for any size."""
    import openvino
    import torch
    from diffusers import AutoencoderTiny
    from safetensors.torch import load_file

    vae = AutoencoderTiny().eval()
    vae.load_state_dict(load_file(options.tiny_vae))
    with torch.no_grad():
        save_whole(openvino.convert_model(vae.decoder, example_input=torch.zeros(1, 4, 16, 16)), target)
