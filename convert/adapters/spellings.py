"""The three spellings in which adapters are written: what the names of tensors end in.

kohya      lora_unet_mid_block_attentions_0_proj_in.lora_down.weight, with .alpha beside it; read by most programs
diffusers  unet.mid_block.attentions.0.proj_in.lora_A.weight; alphas are settings, in the metadata
peft       base_model.model.mid_block.attentions.0.proj_in.lora_A.weight; a folder with the settings in a file, or with
           such a folder for each network, as PEFT's own examples write them
"""

SPELLINGS = ("kohya", "diffusers", "peft")
KOHYA = {  # part -> what its name ends in, of each kind
    "lora": {"down": ".lora_down.weight", "up": ".lora_up.weight", "mid": ".lora_mid.weight"},
    "loha": {part: f".hada_{part}" for part in ("w1_a", "w1_b", "t1", "w2_a", "w2_b", "t2")},
    "lokr": {part: f".lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "glora": {part: f".{part}.weight" for part in ("a1", "a2", "b1", "b2", "bm")},
    "oft": {"blocks": ".oft_blocks", "rescale": ".rescale"},
    "boft": {"blocks": ".oft_blocks", "rescale": ".rescale"},
    "ia3": {"weight": ".weight"},
    "full": {"weight": ".diff"},
    "set": {"weight": ".set_weight"},
}
BESIDE = {"bias": ".diff_b", "dora_scale": ".dora_scale"}
OF_NORMS = {"weight": ".w_norm", "bias": ".b_norm"}
PEFT = {"down": ".lora_A.weight", "up": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
