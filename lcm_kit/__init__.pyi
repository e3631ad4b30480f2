from lcm_kit.api.animations import save_animation as save_animation
from lcm_kit.api.captions import accept_captions as accept_captions
from lcm_kit.api.captions import caption as caption
from lcm_kit.api.client import Client as Client
from lcm_kit.api.editing import edit as edit
from lcm_kit.api.lora_files import convert as convert
from lcm_kit.api.lora_files import export_run as export_run
from lcm_kit.api.lora_files import fuse as fuse
from lcm_kit.api.lora_files import merge as merge
from lcm_kit.api.lora_files import recommended_for as recommended_for
from lcm_kit.api.lora_files import verify as verify
from lcm_kit.api.pictures import load_into as load_into
from lcm_kit.api.pictures import sample_images as sample_images
from lcm_kit.api.stages import Finetuned as Finetuned
from lcm_kit.api.stages import distill as distill
from lcm_kit.api.stages import encode as encode
from lcm_kit.api.stages import evaluate as evaluate
from lcm_kit.api.stages import finetune as finetune
from lcm_kit.api.stages import load_config as load_config
from lcm_kit.api.stages import train as train
from lcm_kit.api.stages import write_report as write_report
from lcm_kit.errors import UserError as UserError

__version__: str
