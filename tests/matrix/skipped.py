"""Files of transformers that name images and hold no vision model of their own, with reasons."""

from __future__ import annotations

_SKIPS = {
    "the vision tower is a class of another file": "aria aya_vision cohere2_vision "
    "colmodernvbert colpali colqwen2 cosmos3_omni deepseek_vl deepseek_vl_hybrid diffusion_gemma "
    "edgetam_video embedding_gemma2 fast_vlm gemma3 gemma3n glm46v granite4_vision "
    "hyperclovax_vision_v2 lfm2_vl lighton_ocr llava llava_next llava_next_video "
    "llava_onevision mistral3 mistral_large4 modernvbert nemotron_h_omni paligemma "
    "pe_audio_video perception_lm pi0 sam2_video sam3_lite_text sam3_tracker "
    "sam3_tracker_video sam3_video shieldgemma2 t5gemma2 ultravbert video_llava vipllava "
    "vision_encoder_decoder vision_text_dual_encoder",
    "text and image tokens share the blocks": "fuyu gemma4_unified layoutlmv3 neomme udop vilt",
    "a detector that reads text; its backbone is a class of another file": "grounding_dino "
    "mm_grounding_dino omdet_turbo tvp",
    "the vision tower is a plain module inside a model that reads text": "idefics",
    "the vision part is a convolutional tokenizer": "chameleon emu3",
    "a convolutional timm backbone; its transformer decodes prompts": "edgetam",
    "a convolutional text detector": "pp_ocrv5_server_det pp_ocrv6_medium_det pp_ocrv6_small_det",
    "not vision": "musicgen musicgen_melody trocr",
    "needs the natten package": "dinat",
}
SKIPPED: dict[str, str] = {file: why for why, files in _SKIPS.items() for file in files.split()}
