#!/usr/bin/env bash
# Fetches the QEMU of Debian's backports beside the one that is installed, and installs nothing: fetch_qemu.sh DIRECTORY.
# Prints its command line, as ONIONSKIN_QEMUS of tests/machine has it. The mirror is the one that apt has here.
set -euo pipefail
mkdir -p "$1"/{lists/partial,cache/archives/partial,packages}
directory=$(cd "$1" && pwd)
codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' "Codename: $codename" | head -n 1)
[ -n "$mirror" ] || { echo "apt has no lists of Debian $codename: apt-get update" >&2; exit 1; }
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $codename-backports main" >"$directory/sources.list"
own=(-q -o "Dir::Etc::SourceList=$directory/sources.list" -o Dir::Etc::SourceParts=- -o "Dir::State::Lists=$directory/lists"
  -o "Dir::Cache=$directory/cache")
apt-get "${own[@]}" update >&2
(cd "$directory/packages" && apt-get "${own[@]}" download qemu-system-x86 qemu-system-common qemu-system-data seabios >&2)
for package in "$directory"/packages/*.deb; do dpkg -x "$package" "$directory"; done
rm -rf "$directory"/{packages,lists,cache}
echo "$directory/usr/bin/qemu-system-x86_64 -L $directory/usr/share/qemu -L $directory/usr/share/seabios"
