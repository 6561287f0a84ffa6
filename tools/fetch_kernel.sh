#!/usr/bin/env bash
# Fetches the package of the cloud kernel of Debian's backports, and installs nothing: fetch_kernel.sh DIRECTORY.
# Prints the directory with the package, as ONIONSKIN_KERNELS of tests/machine has it. The mirror is the one that apt has here.
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
kernel=$(apt-cache "${own[@]}" depends "linux-image-cloud-amd64/$codename-backports" | sed -n 's/.*Depends: //p')
[ -n "$kernel" ] || { echo "the backports of Debian $codename have no cloud kernel" >&2; exit 1; }
(cd "$directory/packages" && apt-get "${own[@]}" download "$kernel" >&2)
rm -rf "$directory"/{lists,cache}
echo "$directory/packages"
