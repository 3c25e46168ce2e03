"""What each module does, in a sentence, and the chapter of the course that says more."""

import re

from sd.study.architecture.description import Node

CHAPTER = {"text_encoder": 3, "text_encoder_2": 11, "unet": 4, "vae": 2, "depth_network": 12}  # by network
BY_NAME = {  # of modules whose name says what they are for; numbers at the end are left out
    "token_embedding": "A table with one vector for each token of the vocabulary.",
    "position_embedding": "A table with one vector for each place in the row of tokens, added to the token's own.",
    "final_norm": "Brings the vectors of the last layer to one scale, as the UNet expects them.",
    "projection": "Turns the end token's vector into one vector for the whole prompt.",
    "time_embed": "Turns the timestep, written as waves of many lengths, into a vector for all residual blocks.",
    "label_emb": "Turns the prompt's pooled vector and the picture's sizes into a vector, added to the timestep's.",
    "time_proj": "Turns the timestep's vector into one number for each channel, added at every place.",
    "unet.out": "A norm, an activation and a last convolution: one predicted number for each number of the latents.",
    "encoder.conv_in": "Turns the picture's three colours into features, with a convolution.",
    "encoder.conv_out": "Reduces the features to a mean and a log-variance for each number of the latents.",
    "decoder.conv_in": "Turns the few channels of the latents into many features, with a convolution.",
    "decoder.conv_out": "Turns features into the three colours of each pixel.",
    "quant_conv": "Mixes the channels of means and log-variances at each place.",
    "post_quant_conv": "Mixes the channels of the latents at each place, before the decoder.",
    "residuals": "The residual blocks of this level, one after another.",
    "mid": "Where the feature maps are smallest: every place looks at every other, between two residual blocks.",
    "skip": "Lets the shortcut change the number of channels.",
    "shortcut": "Lets the shortcut change the number of channels, and the size.",
    "self_attention": "Every place gathers from all the places of the picture that match it.",
    "cross_attention": "Every place gathers from the words of the prompt that match it: here the UNet reads the text.",
    "q": "Makes the queries: what each one looks for.",
    "text_encoder.attention": "Each token gathers from those that match it, among itself and the tokens before it.",
    "text_encoder_2.attention": "Each token gathers from those that match it, among itself and the tokens before it.",
    "attention.out": "Mixes what the heads have found.",
    "feed_forward.proj_in": "Widens each vector, which makes room to compute.",
    "feed_forward.proj_out": "Brings each vector back to its width.",
    "attention.proj_in": "Prepares the channels of each place for the transformer.",
    "attention.proj_out": "Brings the transformer's result back to the channels of the feature map.",
    "patch_proj": "Turns the features of each patch into a token for the transformer.",
    "reduce": "Brings the features of this level to the number of channels of all levels.",
    "readouts": "From tokens to a feature map again: each place also gets the token of the whole picture.",
    "readouts.project": "Mixes each place's token with the token of the whole picture.",
    "head": "The last convolutions: one number for each pixel, larger where it is nearer.",
    "stages": "A stage of bottlenecks at one size of the feature maps.",
}
BY_KIND = {
    "EncoderLayer": "Each token reads the tokens before it, then is worked on alone; both add to what came in.",
    "Attention": "Each one gathers from all that match it.",
    "FeedForward": "Works on each token alone: to a wider vector, through an activation, and back.",
    "GEGLU": "Works on each place alone: half of the hidden values say how much of the other half passes.",
    "SpatialTransformer": "Every place looks at the whole picture, then reads the prompt.",
    "TransformerBlock": "Looks at the picture, reads the prompt, works on each place alone; each adds to what came in.",
    "Downsample": "A convolution in steps of two: half the width and height, so that a place stands for four.",
    "Upsample": "Repeats each place, for twice the width and height, and smooths the result with a convolution.",
    "SelfAttention": "Every place gathers from all the places that match it, with a single head.",
    "GroupNorm": "Gives each group of channels mean 0 and variance 1, then a trained scale and shift to each channel.",
    "LayerNorm": "Gives each vector mean 0 and variance 1, then a trained scale and shift.",
    "Linear": "A matrix: each number of the output is a weighted sum of all of the input.",
    "Fusion": "Adds a feature map to what comes from the deeper ones, and doubles the sides.",
    "Stem": "The first convolution and pooling: the picture at a quarter of its sides.",
}
WITHOUT_WEIGHTS = {  # parts of the drawing that are no networks: title, sentence, chapter
    "tokenizer": (
        "Tokenizer",
        "Cuts the prompt into pieces of its vocabulary, each with a number, and fills the row.",
        3,
    ),
    "latents": (
        "Latents",
        "The picture in the VAE's small form. They begin as pure noise; each step makes them clearer.",
        1,
    ),
    "guidance": (
        "Guidance",
        "The UNet predicts with the prompt and without it. Guidance goes from the prediction without the prompt "
        "past the one with it, so that the picture follows the prompt more closely.",
        6,
    ),
    "sampler": ("Sampler", "Takes some of the predicted noise away, and so gets to the next lower noise level.", 5),
}
UNET_RESIDUAL = (
    "Looks at each place's neighbours with two convolutions, beside a shortcut; the timestep is added between."
)
VAE_RESIDUAL = "Looks at each place's neighbours with two convolutions, beside a shortcut."


def sentence(node: Node) -> str:
    """What the module does. For classes of which nothing is said here, the first line of their docstring."""
    names = [part for part in node.path.split(".") if not part.isdecimal()]
    names[-1] = names[-1].rstrip("0123456789")
    if node.kind == "Block":
        return unet_block(node)
    if node.kind == "ResidualBlock":
        return UNET_RESIDUAL if names[0] == "unet" else VAE_RESIDUAL
    if names[-1] in ("k", "v"):
        source = "of the prompt's vectors" if "cross_attention" in names else "of the same vectors"
        what = "keys, by which each one is found" if names[-1] == "k" else "values, which each one hands over"
        return f"Makes the {what}, out {source}."
    if len(names) > 1 and not re.search(r"\d\.\d+$", node.path):  # which is in a list of lists: a list has the name
        owner = names[-2].removeprefix("self_").removeprefix("cross_")
        for key in (f"{names[0]}.{names[-1]}", f"{owner}.{names[-1]}", names[-1]):
            if key in BY_NAME:
                return BY_NAME[key]
    if "Conv" in node.kind:
        return convolution(node)
    return BY_KIND.get(node.kind) or f"{node.purpose.rstrip('.')}."


def convolution(node: Node) -> str:
    height, width = node.parameters[0].original_shape[-2:]
    if height == width == 1:
        return "A 1 × 1 convolution: mixes the channels of each place."
    return (
        f"A {height} × {width} convolution: each output is a weighted sum over the neighbours and all their channels."
    )


def unet_block(node: Node) -> str:
    layers = [child.path.rpartition(".")[2] for child in node.children]
    (_, channels, _, _), (_, out, height, width) = node.inputs["x"], node.output
    if layers == ["conv"]:
        return f"The way in: a convolution turns the {channels} channels that the UNet reads into {out} features."
    if layers == ["downsample"]:
        return f"Halves the sides, to {height} × {width}: each place now stands for a larger part of the picture."
    rows, columns = node.inputs["x"][2:]
    does = ["looks at neighbours, knowing the timestep"]
    if "attention" in layers:
        does.append("at the whole picture and the prompt")
    if "upsample" in layers:
        does.append(f"doubles the sides, to {height} × {width}")
    if "middle_block" in node.path:
        return f"The turning point, at {rows} × {columns} places: it {', then '.join(does)}, then at neighbours again."
    taken = ", with the details that the skip brings" if node.skips else ""
    return f"Works at {rows} × {columns} places{taken}: it {', then '.join(does)}."
