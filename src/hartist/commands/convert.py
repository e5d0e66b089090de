"""`hartist convert`: between Hartist's layout, the released HART layout and VAR's .pth files."""

from __future__ import annotations

import argparse
from pathlib import Path

from hartist.commands.output import require_writable
from hartist.errors import UserError
from hartist.files import atomic_directory
from hartist.generation.checkpoint import LoadedModel, save_model
from hartist.generation.devices import DTYPES
from hartist.generation.loading import find_model, load_any
from hartist.interop.convert import export_release, export_var
from hartist.interop.release import is_release


def run(args: argparse.Namespace) -> int:
    if args.dtype is not None and args.dtype not in DTYPES:
        raise UserError(f"--dtype {args.dtype} is not one of {', '.join(DTYPES)}")
    dtype = DTYPES[args.dtype] if args.dtype else None
    source = find_model(args.source)
    inputs = [path for path in (source, args.text_model, args.tokenizer) if path is not None]
    check_target(args.out, inputs, force=args.force)
    require_writable(args.out, replaced=True)
    model = load_any(source, dtype=dtype, text_model=args.text_model, tokenizer=args.tokenizer, use_ema=not args.no_ema)
    if args.to == "hartist":
        card = source / "README.md"
        save_model(
            model,
            args.out,
            card=card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None,
        )
    else:
        # The exporters want an empty folder; this one replaces OUT once it is complete.
        with atomic_directory(args.out) as folder:
            if args.to == "release":
                export_release(model.tokenizer, model.transformer, folder, model.text_encoder_dir)
            else:
                export_var(model.tokenizer, model.transformer, *(folder / name for name in var_names(model)))
    print(args.out)
    return 0


def var_names(model: LoadedModel) -> tuple[str, str]:
    """File names after VAR's: var_d16.pth and vae_ch160v4096z32.pth."""
    config = model.tokenizer.config
    vae = f"vae_ch{config.channels}v{config.vocab_size}z{config.latent_channels}.pth"
    return f"var_d{model.transformer.config.depth}.pth", vae


def check_target(out: Path, inputs: list[Path], *, force: bool) -> None:
    """Raise a UserError if `out` may not be written: it holds something, or one of the inputs."""
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
        resolved = out.resolve()
        within = next((path for path in inputs if resolved in (path.resolve(), *path.resolve().parents)), None)
        known = out.is_dir() and holds_model(out)
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror or error}); choose another folder") from error
    if within is not None:
        raise UserError(f"{out} holds {within}, which is to be converted; choose another folder")
    if not force:
        raise UserError(f"{out} already exists; choose a new folder, or pass --force to replace a model")
    if not known:
        raise UserError(f"{out} is not a model, and --force replaces nothing else; choose another folder")


def holds_model(directory: Path) -> bool:
    """Whether `directory` looks like what this command writes: nobody's other files may go with it."""
    names = {path.name for path in directory.iterdir()}
    ours = names <= {"config.json", "tokenizer", "transformer", "text_encoder", "README.md"} and "config.json" in names
    released = is_release(directory) and names <= {"llm", "tokenizer", "text_model"}
    return ours or released or all(name.startswith(("var_d", "vae_ch")) and name.endswith(".pth") for name in names)
