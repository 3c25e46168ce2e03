"""Flags of other programs: what to use here instead."""

NOT_YET = "not supported yet"
ELSEWHERE = {  # our flag, without which a command has no use for the row -> what it is called elsewhere
    "--model": "--ckpt-path --ckpt-name --checkpoint --model-path --model-name --model-id --diffusion-model "
    "--pretrained-model-name-or-path --pretrained-model --sd-model --weights-path",
    "--prompt": "--text --positive --positive-prompt --caption --prompts",
    "--negative-prompt": "--negative --neg --neg-prompt --uc --unconditional-prompt",
    "--guidance-scale": "--cfg --cfg-scale --guidance --cfg-weight --unconditional-guidance-scale --cfg-text",
    "--image-guidance": "--image-guidance-scale --img-cfg-scale --img-cfg --image-cfg --cfg-img",
    "--steps": "--num-inference-steps --ddim-steps --sample-steps --sampling-steps --num-steps --inference-steps",
    "--sampler": "--sampler-name --sampler-index --sampling-method --sample-method",
    "--schedule": "--noise-schedule --scheduler-type --schedule-type",
    "--seed": "--random-seed --manual-seed --noise-seed --generator",
    "--count": "--num-images --num-images-per-prompt --num-samples --number --images --iterations "
    "--batch-count --repeats --amount",
    "--batch-size": "--batch --bs",
    "--init": "--init-image --image --input --input-image --source --init-img --picture",
    "--mask": "--mask-image --init-mask --inpaint-mask --maskimg --mask-img",
    "--strength": "--denoise --denoising --denoising-strength --image-strength --img-strength",
    "--out": "--output --output-path --output-dir --output-file --outfile --outpath --save --save-dir --save-path",
    "--from-file": "--prompts-file --prompts-from-file --input-file --batch-file",
    "--tile": "--seamless --circular",
    "--refiner": "--refiner-model --refiner-checkpoint --sd-refiner --refiner-path",
    "--switch-at": "--denoising-end --denoising-start --high-noise-frac --refiner-start --refiner-steps",
    "--prompt-2": "--prompt2 --style-prompt",
    "--original-size": "--target-size --size-conditioning",
    "--crop": "--crops-coords-top-left --crop-coords",
    "--rank": "--network-dim --lora-rank --lora-dim",
    "--conv-rank": "--conv-dim --locon-dim",
    "--weight": "--ratio --ratios --base-alpha --interpolation",
    "--block-weights": "--weights-alpha --mbw --use-blocks",
    "--spelling": "--key-format --naming",
    "--embeddings": "--embedding --embd-dir --embeddings-dir --embedding-dir --textual-inversion "
    "--textual-inversion-dir --embedding-path --ti",
    "--lora": "--loras --lora-path --lora-weights --lora-name --lora-file --adapter --adapters --use-lora",
    "--vae": "--vae-path --vae-name",
    "--tiny-vae": "--taesd --taesd-path --tae --tae-path --use-taesd --tiny-autoencoder --vae-approx",
    "--tiled-vae": "--vae-tiling --vae-slicing --enable-vae-tiling --tiled",
    "--low-memory": "--lowvram --medvram --low-vram --novram --cpu-offload --offload --offload-to-cpu "
    "--enable-model-cpu-offload --sequential-guidance --vae-on-cpu --clip-on-cpu --low-mem",
    "--eta": "--ddim-eta",
    "--vary": "--variation-amount --subseed-strength",
    "--vary-seed": "--variations --with-variations",
    "--hires-strength": "--hr-denoise --hires-denoise",
    "--hires-steps": "--hr-second-pass-steps",
    "--hires-upscale": "--hr-upscaler --hires-upscaler",
    "--like": "--metadata --from-image --reproduce",
    "--grid": "--contact-sheet --make-grid --save-grid",
    "--quiet": "--silent --no-progress --disable-tqdm --disable-progress-bar",
    "--json": "--output-format",
    "--debug": "--traceback",
}
SAID = {  # flags -> our flag that it needs, and what to say
    "--size --resolution --dimensions --image-size": ("--width", "Give --width and --height."),
    "--upscale --hires-fix --enable-hr --hr --hr-scale --hires-scale --scale-factor": ("--hires", "Use --hires 2."),
    "--scheduler": ("--sampler", "Use --sampler; --schedule chooses its noise levels."),
    "--fp16 --half --half-precision --float16": ("--precision", "Use --precision fp16."),
    "--bf16 --bfloat16 --force-bf16": ("--precision", "Use --precision bf16."),
    "--int8 --q8 --quantize --quantization": ("--precision", "Use --precision int8, on a CPU."),
    "--fp32 --full --full-precision --no-half --no-half-vae --force-fp32 --float32": (
        "--precision",
        "Use --precision fp32.",
    ),
    "--dtype --torch-dtype --type": ("--precision", "Use --precision fp32, fp16, bf16 or int8."),
    "--cpu --use-cpu --no-cuda": ("--device", "Use --device cpu."),
    "--gpu --cuda --use-gpu": ("--device", "Use --device cuda."),
    "--threads --num-threads": ("", "Set the environment variable OMP_NUM_THREADS instead."),
    "--verbose": ("--quiet", "Messages are shown anyway; --quiet hides them, --debug shows where an error arises."),
    "--mode": ("", "Each mode is a command: sd txt2img, sd img2img, sd inpaint, sd edit."),
    "--listen --port --share --api --autolaunch --server-name": ("", "There is no server and no page yet."),
    "--xformers --opt-sdp-attention --diffusion-fa --flash-attn --opt-split-attention": (
        "--model",
        "Leave it out: attention is computed the fast way.",
    ),
    "--safetensors --unsafe --disable-safe-unpickle --trust-remote-code --pickle": (
        "",
        "Leave it out: files of any format are read as data, and nothing in them runs.",
    ),
    "--safety-checker --disable-safety-checker --no-safety-checker --nsfw": (
        "--model",
        "Leave it out: there is no safety checker.",
    ),
    "--config --original-config --yaml --inference-config": ("--model", "Leave it out: the file says what it holds."),
    "--lora-model-dir --lora-dir --lora-folder --lora-models": (
        "--lora",
        "Give the file, --lora FOLDER/NAME.safetensors; names are looked up in the folder loras beside your models.",
    ),
    "--lora-scale --lora-strength --lora-weight --lora-multiplier --lora-alpha": (
        "--lora",
        "Put the strength behind the name: --lora NAME:0.8.",
    ),
    "--lora-apply-mode --fuse-lora --merge-lora": ("--lora", "Leave it out: LoRAs are added to the weights, in fp32."),
    "--controlnet --control-net --control-image --control-strength --controlnet-dir": (
        "--model",
        f"ControlNet is {NOT_YET}.",
    ),
    "--refiner --switch-at --switch-by": ("--compare", "A page shows one model: leave it out."),
    "--like": ("--compare", "Give the settings; sd show PICTURE lists them."),
    "--hypernetwork --hypernetwork-dir": ("--model", f"Hypernetworks are {NOT_YET}."),
    "--ip-adapter --ip-adapter-image": ("--model", f"IP-Adapters are {NOT_YET}."),
    "--upscale-model --esrgan --gfpgan-strength --restore-faces --codeformer-fidelity": (
        "--model",
        f"Networks that enlarge or repair pictures are {NOT_YET}.",
    ),
}
USE_INSTEAD = {theirs: (ours, f"Use {ours}.") for ours, names in ELSEWHERE.items() for theirs in names.split()}
USE_INSTEAD |= {theirs: row for names, row in SAID.items() for theirs in names.split()}
