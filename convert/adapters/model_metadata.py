"""What an adapter's metadata say of the model that it is for, in the words of kohya's scripts and of modelspec.

kohya-ss/sd-scripts, library/sai_model_spec.py, and get_model_version_str_for_sd1_sd2 in library/train_util.py.
"""

from sd.config import ModelConfig


def model_metadata(config: ModelConfig, kind: str) -> dict[str, str]:
    """For models of versions 1 and 2. kind: "lora" or "textual-inversion"."""
    is_second, predicts_v = config.family.startswith("sd-v2"), config.prediction == "v"
    size = ("-768-v" if predicts_v else "-512") if is_second else ""
    return {
        "ss_base_model_version": f"sd_v{1 + is_second}{'_v' * predicts_v}",
        "ss_v2": str(is_second),
        "modelspec.architecture": f"stable-diffusion-v{1 + is_second}{size}/{kind}",
        "modelspec.prediction_type": "v" if predicts_v else "epsilon",
    }
