# SPDX-License-Identifier: Apache-2.0
# Debian packages. Sourced by ./dev.
# shellcheck shell=bash

# name[>=version]; on Debian 12 those of the first list come from bookworm-backports.
newer_packages=(
    'qemu-system-x86>=1:10.0' 'qemu-utils>=1:10.0' ovmf
    'bacula-fd>=15.0' 'bacula-sd>=15.0' 'bacula-console>=15.0'
    'bacula-director>=15.0' 'bacula-director-sqlite3>=15.0'
)
packages=(
    ca-certificates python3 python3-venv gcc make libc6-dev
    nbdkit libnbd-bin swtpm swtpm-tools sqlite3
    mtools fdisk grub-common cpio zstd xz-utils e2fsprogs
)

# wanting PACKAGE[>=VERSION]…: those not installed, or older.
wanting() {
    local wanted name least
    declare -A installed=()
    while read -r name least; do
        [ "$least" = - ] || installed[$name]=$least
    done < <(dpkg-query -W -f='${binary:Package} ${db:Status-Status} ${Version}\n' \
        "${@%%>=*}" 2>/dev/null |
        awk '{ sub(/:.*/, "", $1); print $1, ($2 == "installed" ? $3 : "-") }')
    for wanted; do
        name=${wanted%%>=*} least=${wanted#*>=}
        if [ -z "${installed[$name]+set}" ]; then
            echo "$name"
        elif [ "$least" != "$wanted" ] &&
            ! dpkg --compare-versions "${installed[$name]}" ge "$least"; then
            echo "$name"
        fi
    done
}

# Packages start their services when installed, unless policy-rc.d says no.
install_packages() {
    local policy=/usr/sbin/policy-rc.d made= status=0
    if [ ! -e $policy ]; then
        made=yes
        printf '#!/bin/sh\nexit 101\n' | as_root tee $policy >/dev/null
        as_root chmod 755 $policy
        # The rest of ./dev may die at any point; the machine gets its ways back.
        trap 'as_root rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    as_root env DEBIAN_FRONTEND=noninteractive DEBIAN_PRIORITY=critical \
        apt-get -q -y -o Dpkg::Options::=--force-confold -o Dpkg::Use-Pty=0 \
        --no-install-recommends install "$@" || status=$?
    if [ -n "$made" ]; then
        as_root rm -f $policy
        trap - EXIT
    fi
    return $status
}

setup_system() {
    local newer missing target=()
    read_release
    [ "$release_id" = debian ] || die "Debian 12 or 13 is needed, this is ${release_id:-unknown}"
    case $codename in
    bookworm) target=(-t bookworm-backports) ;;
    trixie) ;;
    *) die "Debian 12 (bookworm) or 13 (trixie) is needed, this is $codename" ;;
    esac
    mapfile -t newer < <(wanting "${newer_packages[@]}")
    mapfile -t missing < <(wanting "${packages[@]}")
    [ $((${#newer[@]} + ${#missing[@]})) -gt 0 ] || return 0
    if ! can_be_root; then
        die "not root and no password-free sudo. As root, run: apt-get install" \
            --no-install-recommends "${target[@]}" "${newer[@]}" "${missing[@]}"
    fi
    if [ "$codename" = bookworm ] &&
        ! apt_sources | cut -f2 | grep -qx bookworm-backports; then
        say "adding bookworm-backports from this machine's own mirror"
        write_source bookworm-backports >"$build/backports.sources"
        as_root install -m 644 "$build/backports.sources" \
            /etc/apt/sources.list.d/pveplug-backports.sources
    fi
    say "apt-get update"
    logged apt-update as_root apt-get -q update
    if [ ${#missing[@]} -gt 0 ]; then
        say "installing ${missing[*]}"
        logged apt-main install_packages "${missing[@]}"
    fi
    if [ ${#newer[@]} -gt 0 ]; then
        say "installing ${newer[*]}"
        # The lab makes its own catalogue below its own directory.
        as_root debconf-set-selections \
            <<<'bacula-director-sqlite3 bacula-director-sqlite3/dbconfig-install boolean false'
        logged apt-newer install_packages "${target[@]}" "${newer[@]}"
    fi
    mapfile -t missing < <(wanting "${newer_packages[@]}" "${packages[@]}")
    [ ${#missing[@]} -eq 0 ] || die "still missing after apt-get: ${missing[*]}"
}

# Downloads need package lists; a machine may have come without.
refresh_lists() {
    say "apt-get update"
    can_be_root || die "apt has no current lists. As root, run: apt-get update"
    logged apt-update as_root apt-get -q update
}
