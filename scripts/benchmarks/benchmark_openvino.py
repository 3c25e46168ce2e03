"""OpenVINO as a contender of `benchmark.py`."""

import json
from pathlib import Path

from benchmark_contender import ENDLESS, PROMPT, Contender
from benchmark_diffusers import Diffusers

PARTS = ("text_encoder", "unet", "vae_decoder")


class OpenVINO(Diffusers):
    """The three networks compiled by OpenVINO for one size, with the tokenizer and the scheduler of diffusers."""

    own_precision = None

    def imports(self) -> None:
        Contender.imports(self)
        import openvino
        from diffusers import DDIMScheduler
        from diffusers.image_processor import VaeImageProcessor
        from transformers import CLIPTokenizer

        self.openvino, self.scheduler_class, self.tokenizer_class = openvino, DDIMScheduler, CLIPTokenizer
        self.processor = VaeImageProcessor()
        self.dtype = self.torch.float32  # of inputs and outputs; inside, networks use the requested precision

    def load(self) -> None:
        folder = Path(self.options.folder)
        self.core = self.openvino.Core()
        self.networks = {part: self.core.read_model(Path(self.options.openvino) / f"{part}.xml") for part in PARTS}
        self.scheduler = self.scheduler_class.from_config(
            self.scheduler_class.load_config(folder / "scheduler", local_files_only=True)
        )
        self.tokenizer = self.tokenizer_class.from_pretrained(folder / "tokenizer", local_files_only=True)
        self.scale = json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"]

    def prepare(self, width: int, height: int, batch_size: int) -> None:
        latents = [4, height // 8, width // 8]
        context = json.loads((Path(self.options.folder) / "unet" / "config.json").read_text())["cross_attention_dim"]
        shapes = {
            "text_encoder": [[2 * batch_size, 77]],
            "unet": [[2 * batch_size, *latents], [], [2 * batch_size, 77, context]],
            "vae_decoder": [[batch_size, *latents]],
        }
        hints = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}[self.options.precision],
        }
        if self.options.threads:
            hints["INFERENCE_NUM_THREADS"] = self.options.threads
        self.ready = {}
        for part, network in self.networks.items():
            network.reshape(dict(enumerate(shapes[part])))
            self.ready[part] = self.core.compile_model(network, "CPU", hints)
        super().prepare(width, height, batch_size)

    def answer(self, part: str, *inputs):
        return self.torch.from_numpy(self.ready[part]([values.numpy() for values in inputs])[0])

    def encode_text(self):
        texts = [""] * self.batch_size + [PROMPT] * self.batch_size
        tokens = self.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        return self.answer("text_encoder", tokens.input_ids)

    def predict(self, x, timestep, context):
        return self.answer("unet", x, timestep, context)

    def decode(self) -> None:
        self.processor.postprocess(self.answer("vae_decoder", self.latest / self.scale), output_type="pil")

    def denoised(self, steps: int):
        self.context = self.encode_text()
        self.begin(steps)
        for _ in range(steps):
            self.step()
        latents = self.latest
        self.begin(ENDLESS)
        return latents

    def pictures(self, steps: int) -> None:
        self.latest = self.denoised(steps)
        self.decode()

    def versions(self) -> dict[str, object]:
        return {"openvino": self.openvino.__version__, **super().versions()}


def export_to_openvino(folder: Path, target: Path) -> None:
    """Write the networks of a diffusers folder in OpenVINO's form, float32, any size."""
    import openvino
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    class Only(torch.nn.Module):
        """A network that returns one tensor."""

        def __init__(self, network: torch.nn.Module, call):
            super().__init__()
            self.network, self.call = network, call

        def forward(self, *inputs):
            return self.call(self.network, *inputs)

    unet = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True).eval()
    vae = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True).eval()
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True).eval()
    latents, context = torch.zeros(2, 4, 16, 16), torch.zeros(2, 77, unet.config.cross_attention_dim)
    tokens = torch.zeros(2, 77, dtype=torch.int64)
    wanted = {
        "text_encoder": (Only(text, lambda network, tokens: network(tokens)[0]), (tokens,)),
        "unet": (
            Only(unet, lambda network, x, t, context: network(x, t, context, return_dict=False)[0]),
            (latents, torch.tensor(1), context),
        ),
        "vae_decoder": (Only(vae, lambda network, x: network.decode(x, return_dict=False)[0]), (latents,)),
    }
    for part, (network, example) in wanted.items():
        with torch.no_grad():
            model = openvino.convert_model(network, example_input=example)
        openvino.save_model(model, target / f"{part}.xml", compress_to_fp16=False)
