#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# prefix.sh bacula-9.6.7|qemu-7.2: unpack the release of Debian 12's main suite below
# .build/prefix/NAME, on Debian 12 or 13, beside the newer one that is installed.
#
# bin/ holds a wrapper for each program, which finds its libraries, modules and firmware.
# apt gets a root of its own (lists, state, sources), so nothing of the system changes.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=tools/common.sh
. "$repository/tools/common.sh"
read_release

name=${1:?usage: prefix.sh bacula-9.6.7|qemu-7.2}
case $name in
bacula-9.6.7)
    packages=(bacula-common bacula-fd bacula-sd bacula-console bacula-director
        bacula-common-sqlite3 bacula-director-sqlite3)
    version=9.6.7-
    programs=(bacula-fd bacula-sd bacula-dir bconsole bls bextract)
    ;;
qemu-7.2)
    packages=(qemu-system-x86 qemu-system-common qemu-system-data qemu-utils
        seabios ipxe-qemu)
    version=1:7.2+
    programs=(qemu-system-x86_64 qemu-img qemu-nbd qemu-io qemu-storage-daemon)
    ;;
*) die "no such prefix: $name" ;;
esac
suite=bookworm
prefix=$build/prefix/$name
debs=$repository/.cache/debs/$name
apt=$build/apt/$suite

mkdir -p "$apt"/{sources,state/lists/partial,cache/archives/partial} "$debs"
: >"$apt/status"
write_source $suite >"$apt/sources/main.sources"
options=(
    -q -o "Dir::Etc::sourcelist=/dev/null" -o "Dir::Etc::sourceparts=$apt/sources"
    -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null
    -o "Dir::State=$apt/state" -o "Dir::State::status=$apt/status"
    -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root -o Acquire::Languages=none
)
if [ -z "$(find "$apt/state/lists" -name '*Packages*' -mmin -1440 -print -quit)" ]; then
    logged "apt-$suite" apt-get "${options[@]}" update
fi

unpack() { # PACKAGE…: download what isn't there yet, unpack into the prefix
    local package missing=() deb
    for package; do
        [ -n "$(find "$debs" -name "${package}_*.deb" -print -quit)" ] ||
            missing+=("$package")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        (cd "$debs" && logged "download-$name" apt-get "${options[@]}" download "${missing[@]}")
    fi
    for package; do
        for deb in "$debs/${package}"_*.deb; do
            dpkg-deb -x "$deb" "$new"
        done
    done
}

# qemu-system-data is an "all" package; its candidate must match the others'.
candidate=$(apt-cache "${options[@]}" policy "${packages[0]}" | awk '$1 == "Candidate:" { print $2 }')
case $candidate in
"$version"*) ;;
*) die "${packages[0]} of $suite is ${candidate:-unknown}, not $version" ;;
esac

new=$prefix.new
rm -rf "$new"
mkdir -p "$new/bin"
unpack "${packages[@]}"

find_program() { find "$new"/usr/{bin,sbin} "$new/usr/libexec" -name "$1" -print -quit 2>/dev/null || true; }
# Libraries: where the host has them under the same name, the host's; otherwise all of
# those of the suite except the C and C++ runtimes, which are upward compatible.
library_path=usr/lib/bacula:usr/lib/x86_64-linux-gnu:lib/x86_64-linux-gnu
lacking() {
    local program path=${library_path//:/:$new/}
    for program in "${programs[@]}"; do
        LD_LIBRARY_PATH=$new/$path ldd "$(find_program "$program")"
    done 2>&1 | awk '/not found/ { print $1 }' | sort -u
}
for program in "${programs[@]}"; do
    [ -n "$(find_program "$program")" ] || die "$name: the packages hold no $program"
done
if [ -n "$(lacking)" ]; then
    mapfile -t libraries < <(apt-cache "${options[@]}" depends --recurse --no-recommends \
        --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances \
        "${packages[@]}" |
        grep -E '^lib' | grep -vE '^(libc6|libc-bin|libgcc-s1|libstdc\+\+6|libcrypt1)$|-(dev|data|common|perl)$|^libcommon|^libdpkg|^libapt' |
        sort -u)
    unpack "${libraries[@]}"
    still=$(lacking)
    [ -z "$still" ] || die "$name: no package of $suite brings" "$still"
fi

for program in "${programs[@]}"; do
    target=$(find_program "$program")
    {
        echo '#!/bin/sh'
        echo '# Written by tools/prefix.sh.'
        echo "prefix=$prefix"
        echo "LD_LIBRARY_PATH=\$prefix/${library_path//:/:\$prefix/}\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
        echo 'export LD_LIBRARY_PATH'
        case $name in qemu-*)
            echo 'export QEMU_MODULE_DIR=$prefix/usr/lib/x86_64-linux-gnu/qemu'
            ;;
        esac
        firmware=
        if [ "$program" = qemu-system-x86_64 ]; then
            firmware=' -L "$prefix/usr/share/qemu" -L "$prefix/usr/share/seabios" -L "$prefix/usr/lib/ipxe/qemu"'
        fi
        echo "exec \"\$prefix${target#"$new"}\"$firmware \"\$@\""
    } >"$new/bin/$program"
    chmod 755 "$new/bin/$program"
done
rm -rf "$prefix"
mv "$new" "$prefix"

# It must run, and be what it says.
case $name in
bacula-*) said=$("$prefix/bin/bacula-fd" -? 2>&1 || true) wanted=9.6.7 ;;
qemu-*) said=$("$prefix/bin/qemu-system-x86_64" --version 2>&1) wanted='version 7.2' ;;
esac
case $said in
*"$wanted"*) ;;
*) die "$name doesn't run: $said" ;;
esac
