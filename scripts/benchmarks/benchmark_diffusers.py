"""diffusers as a contender of `benchmark.py`: with its defaults, tuned, and compiled."""

from benchmark_contender import PROMPT, SEED, Contender, Options


class Diffusers(Contender):
    """diffusers with its defaults: float32, whatever precision the others have."""

    own_precision = "fp32"
    channels_last = False
    compiled = False

    @classmethod
    def files(cls, options: Options) -> list[str]:
        return [options.checkpoint, options.folder]  # of which the first becomes the second

    def imports(self) -> None:
        super().imports()
        from diffusers import DDIMScheduler, DiffusionPipeline

        self.pipeline_class, self.scheduler_class = DiffusionPipeline, DDIMScheduler

    def load(self) -> None:
        precision = {} if self.own_precision else {"torch_dtype": self.dtype}
        pipe = self.pipeline_class.from_pretrained(self.options.folder, local_files_only=True, **precision)
        pipe = pipe.to(self.options.device)
        pipe.scheduler = self.scheduler_class.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        self.tune(pipe, on_gpu=self.options.device.startswith("cuda"))
        self.pipe, self.scheduler = pipe, pipe.scheduler

    def tune(self, pipe, *, on_gpu: bool) -> None:
        """Apply the advice of diffusers' documentation; what slows compilation only in `max-autotune`."""
        if self.channels_last:
            for network in (pipe.unet, pipe.vae):
                network.to(memory_format=self.torch.channels_last)
            if on_gpu:
                pipe.fuse_qkv_projections()
        if not self.compiled:
            return
        from torch._inductor import config

        if not on_gpu:
            config.freezing = True  # weights become constants in the layout that the CPU prefers
            pipe.unet.compile()
        else:
            config.conv_1x1_as_mm = True
            if self.options.compile_mode == "max-autotune":
                config.coordinate_descent_tuning = config.coordinate_descent_check_all_directions = True
                config.epilogue_fusion = False
            pipe.unet.compile(mode=self.options.compile_mode, fullgraph=True)

    def prepare(self, width: int, height: int, batch_size: int) -> None:
        self.width, self.height, self.batch_size = width, height, batch_size
        self.noise = self.first_noise().to(self.options.device, self.dtype)
        self.context = self.encode_text()
        self.begin(self.way.endless)

    def first_noise(self):
        """(B, 4, H/8, W/8): each picture's from its own generator, as in sd-zoo."""
        generators = [self.torch.Generator().manual_seed(SEED + i) for i in range(self.batch_size)]
        shape = (4, self.height // 8, self.width // 8)
        return self.torch.stack([self.torch.randn(shape, generator=generator) for generator in generators])

    def encode_text(self) -> tuple:
        """What the UNet gets for the empty prompt, then for the prompt: (2B, 77, width), and for XL a vector."""
        options = {"device": self.options.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        with self.torch.no_grad():
            texts = self.pipe.encode_prompt([PROMPT] * self.batch_size, **options)
        context, *pooled = (self.torch.cat(pair) for pair in zip(texts[1::2], texts[::2], strict=True))
        return context, *(self.with_sizes(each) for each in pooled)

    def with_sizes(self, pooled) -> tuple:
        """The vector's two parts: the pooled prompts, and the picture's sizes."""
        size = (self.height, self.width)
        return pooled, self.torch.tensor([[*size, 0, 0, *size]] * len(pooled)).to(pooled)

    def begin(self, steps: int) -> None:
        self.scheduler.set_timesteps(steps, device=self.options.device)
        self.timesteps = iter(self.scheduler.timesteps)
        self.latest = self.noise * self.scheduler.init_noise_sigma

    def step(self) -> None:
        timestep = next(self.timesteps, None)
        if timestep is None:
            self.begin(self.way.endless)
            timestep = next(self.timesteps)
        with self.torch.no_grad():
            x = self.scheduler.scale_model_input(self.torch.cat([self.latest] * 2), timestep)
            negative, positive = self.predict(x, timestep, *self.context).chunk(2)
            eps = negative + self.way.guidance_scale * (positive - negative)
            self.latest = self.scheduler.step(eps, timestep, self.latest, return_dict=False)[0]

    def predict(self, x, timestep, context, vector=None):
        """With the arguments of the pipeline's own call, so that torch.compile does not compile again."""
        given = dict.fromkeys(("timestep_cond", "cross_attention_kwargs", "added_cond_kwargs"))
        if vector:
            given["added_cond_kwargs"] = dict(zip(("text_embeds", "time_ids"), vector, strict=True))
        return self.pipe.unet(x, timestep, encoder_hidden_states=context, **given, return_dict=False)[0]

    def decode(self) -> None:
        with self.torch.no_grad():
            image = self.pipe.vae.decode(self.latest / self.pipe.vae.config.scaling_factor, return_dict=False)[0]
            self.pipe.image_processor.postprocess(image, output_type="pil")

    def run(self, steps: int, **options: object):
        return self.pipe(
            [PROMPT] * self.batch_size,
            width=self.width,
            height=self.height,
            num_inference_steps=steps,
            guidance_scale=self.way.guidance_scale,
            latents=self.noise,
            **options,
        ).images

    def pictures(self, steps: int) -> list:
        pictures = self.run(steps)
        self.begin(self.way.endless)  # the scheduler is the same one
        return pictures

    def denoised(self, steps: int):
        latents = self.run(steps, output_type="latent")
        self.begin(self.way.endless)
        return latents

    def versions(self) -> dict[str, object]:
        import diffusers
        import transformers

        try:
            import accelerate

            loads_with = accelerate.__version__
        except ImportError:
            loads_with = "not installed"
        own = {"diffusers": diffusers.__version__, "transformers": transformers.__version__, "accelerate": loads_with}
        return {**own, **super().versions()}


class DiffusersPlain(Diffusers):
    """In the precision of the others, otherwise with its defaults."""

    own_precision = None


class DiffusersTuned(Diffusers):
    """In the precision of the others, in channels_last; on a GPU with fused projections."""

    own_precision = None
    channels_last = True


class DiffusersCompiled(DiffusersTuned):
    """The same with a compiled UNet; the first step of each size compiles."""

    compiled = True
