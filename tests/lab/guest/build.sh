#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# build.sh OUT: make the tiny guest, a Linux that boots in seconds under emulation.
#
# Rootless: packages are downloaded and unpacked, never installed; nothing is mounted, no
# loop device is used. Works on Debian 12 and 13. Result in OUT:
#
#   vmlinuz, initrd.img   Debian's cloud kernel; busybox, virtio, AHCI and IDE modules, qemu-ga
#   boot.raw              64 MiB, MBR: GRUB for BIOS, ext4 with the same kernel
#   boot-efi.raw          96 MiB, GPT: EFI system partition with GRUB, ext4 as above
#
# Kernel line and console markers: see init. Programs for guest-exec, all in /bin:
#
#   tg-write DEV OFF4K COUNT SEED          tg-writer DEV SECONDS SEED [PER_SECOND]
#   tg-latency DEV SECONDS SEED PER_SECOND
#   tg-sum DEV [BYTES]                     tg-mark TEXT             tg-shutdown
#
# DEV may be a file below /mnt, the mounted ext4. APT_OPTIONS is passed to apt-get.
set -euo pipefail
shopt -s nullglob

[ $# = 1 ] || { echo "usage: build.sh OUT" >&2; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
debs=$out/debs
work=$(mktemp -d "$out/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
unpacked=$work/unpacked
root=$work/root
mkdir -p "$debs" "$unpacked" "$root"
export PATH=$PATH:/usr/sbin:/sbin
export SOURCE_DATE_EPOCH=1700000000

die() { echo "build.sh: $*" >&2; exit 1; }

for program in apt-get apt-cache dpkg-deb mke2fs cpio zstd xz ldd gcc sfdisk mformat grub-mkimage; do
    command -v "$program" >/dev/null || die "needs $program"
done

# ---- packages ------------------------------------------------------------------------
# The meta package names the kernel of the day: take the first concrete one it leads to.
kernel=$(apt-cache depends linux-image-cloud-amd64 |
    awk '$1 == "Depends:" && $2 ~ /^linux-image-[0-9]/ { print $2; exit }')
[ -n "$kernel" ] || die "apt knows no linux-image-cloud-amd64 (apt-get update?)"
packages=("$kernel" busybox-static qemu-guest-agent grub-pc-bin grub-efi-amd64-bin)
# Debian 13 keeps a kernel's modules in its image package as well; nothing else to fetch.
for package in "${packages[@]}"; do
    found=("$debs/${package}"_*.deb)
    [ ${#found[@]} -gt 0 ] || missing+=("$package")
done
if [ -n "${missing+set}" ]; then
    # shellcheck disable=SC2086 # options are words
    (cd "$debs" && apt-get -qq -o APT::Sandbox::User=root ${APT_OPTIONS:-} \
        download "${missing[@]}") || die "download of ${missing[*]} failed"
fi
for package in "${packages[@]}"; do
    found=("$debs/${package}"_*.deb)
    dpkg-deb -x "$(printf '%s\n' "${found[@]}" | sort -V | tail -n1)" "$unpacked"
done

# ---- kernel and its modules ----------------------------------------------------------
image=("$unpacked"/boot/vmlinuz-*)
[ ${#image[@]} = 1 ] || die "expected one kernel, found ${#image[@]}"
version=${image[0]##*/vmlinuz-}
cp "${image[0]}" "$out/vmlinuz"
modules=$unpacked/lib/modules/$version
[ -d "$modules" ] || modules=$unpacked/usr/lib/modules/$version
[ -d "$modules" ] || die "kernel $version brought no modules"

mkdir -p "$root"/{bin,sbin,dev,proc,sys,mnt,tmp,run,etc/qemu,modules,var/run,var/log}
declare -A have=()
add_module() { # NAME: copy it after everything it depends on; built in or unknown: nothing
    local name=${1//-/_} file needs need
    [ -z "${have[$name]+set}" ] || return 0
    have[$name]=1
    file=$(find "$modules" -regextype posix-extended \
        -regex ".*/${name//_/[-_]}\.ko(\.xz|\.zst|\.gz)?" -print -quit)
    [ -n "$file" ] || return 0
    case $file in
    *.xz) xz -dc "$file" ;;
    *.zst) zstd -qdc "$file" ;;
    *.gz) gzip -dc "$file" ;;
    *) cat "$file" ;;
    esac >"$root/modules/$name.ko"
    needs=$(tr '\0' '\n' <"$root/modules/$name.ko" | sed -n 's/^depends=//p' | head -n1)
    for need in ${needs//,/ }; do
        add_module "$need"
    done
    echo "$name.ko" >>"$root/modules/order"
}
: >"$root/modules/order"
for name in virtio_pci crc32c_generic crc32c_intel crc_t10dif crct10dif_common sd_mod \
    virtio_scsi virtio_blk virtio_console ahci ata_piix ext4; do
    add_module "$name"
done
grep -q '^virtio_scsi' "$root/modules/order" || die "kernel $version has no virtio_scsi"

# ---- programs ------------------------------------------------------------------------
busybox=$unpacked/bin/busybox
[ -f "$busybox" ] || busybox=$unpacked/usr/bin/busybox
agent=$unpacked/usr/sbin/qemu-ga
[ -f "$agent" ] || agent=$unpacked/usr/bin/qemu-ga
cp "$busybox" "$root/bin/busybox"
cp "$agent" "$root/sbin/qemu-ga"
# qemu-ga comes from this Debian, so its libraries do too.
libraries=$(ldd "$agent")
case $libraries in *"not found"*) die "qemu-ga lacks libraries: $libraries" ;; esac
while read -r library; do
    mkdir -p "$root${library%/*}"
    cp -L "$library" "$root$library"
done < <(awk '{ for (i = 1; i <= NF; i++) if ($i ~ /^\//) { print $i; next } }' <<<"$libraries")
gcc -std=c11 -O2 -static -Wall -Wextra -Werror -o "$root/bin/tg-write" "$here/tg.c"
strip "$root/bin/tg-write"
ln "$root/bin/tg-write" "$root/bin/tg-writer"
ln "$root/bin/tg-write" "$root/bin/tg-latency"
cp "$here"/tg-sum "$here"/tg-mark "$here"/tg-shutdown "$root/bin/"
ln -s ../bin/tg-shutdown "$root/sbin/shutdown" # what qemu-ga runs for guest-shutdown
cp "$here/init" "$root/init"
chmod 755 "$root/init" "$root"/bin/*
(cd "$root" && find . | LC_ALL=C sort | cpio -o -H newc -R 0:0 --quiet --reproducible) |
    zstd -q -12 -T0 -f -o "$out/initrd.img"

# ---- the ext4 both disks share --------------------------------------------------------
boot=$work/boot
mkdir -p "$boot/boot/grub"
cp "$out/vmlinuz" "$out/initrd.img" "$boot/boot/"
echo tiny-guest >"$boot/tg-marker"
cat >"$boot/boot/grub/grub.cfg" <<'GRUB'
serial --unit=0 --speed=115200
terminal_output serial
set timeout=0
linux /boot/vmlinuz console=ttyS0 quiet mitigations=off tg.root=TGROOT
initrd /boot/initrd.img
boot
GRUB
make_ext4() { # IMAGE OFFSET SIZE_MIB
    # GRUB of Debian 12 can't read these two newer features of e2fsprogs.
    local size=$3M features=^metadata_csum_seed,^orphan_file
    mke2fs -q -F -t ext4 -b 4096 -L TGROOT -O "$features" -E "offset=$2,root_owner=0:0" \
        -d "$boot" "$1" "$size" 2>"$work/mke2fs" ||
        mke2fs -q -F -t ext4 -b 4096 -L TGROOT -E "offset=$2,root_owner=0:0" \
            -d "$boot" "$1" "$size" 2>"$work/mke2fs" ||
        die "mke2fs: $(cat "$work/mke2fs")"
}
MiB=$((1024 * 1024))
common=(ext2 linux normal serial terminal echo boot configfile)

# ---- BIOS: MBR, GRUB in the gap before the first partition ----------------------------
disk=$work/boot.raw
bios=$unpacked/usr/lib/grub/i386-pc
truncate -s $((64 * MiB)) "$disk"
sfdisk -q --no-reread --no-tell-kernel -w never "$disk" <<<'label: dos
start=2048, type=83, bootable'
make_ext4 "$disk" $MiB 63
grub-mkimage -d "$bios" -O i386-pc -p '(hd0,msdos1)/boot/grub' -o "$work/core.img" \
    biosdisk part_msdos "${common[@]}"
[ "$(stat -c %s "$work/core.img")" -lt $((MiB - 512)) ] || die "GRUB's core is too large"
# boot.img loads the core from sector 1 unless told otherwise; keep the partition table.
dd if="$bios/boot.img" of="$disk" bs=440 count=1 conv=notrunc status=none
dd if="$work/core.img" of="$disk" bs=512 seek=1 conv=notrunc status=none
mv "$disk" "$out/boot.raw"

# ---- UEFI: GPT, an EFI system partition with the fallback path -------------------------
disk=$work/boot-efi.raw
efi=$unpacked/usr/lib/grub/x86_64-efi
esp_mib=16
truncate -s $((96 * MiB)) "$disk"
sfdisk -q --no-reread --no-tell-kernel -w never "$disk" <<<"label: gpt
start=2048, size=$((esp_mib * 2048)), type=uefi
start=$(((1 + esp_mib) * 2048)), size=$(((96 - esp_mib - 2) * 2048)), type=linux"
make_ext4 "$disk" $(((1 + esp_mib) * MiB)) $((96 - esp_mib - 2))
cat >"$work/early.cfg" <<'GRUB'
search --no-floppy --label --set=root TGROOT
set prefix=($root)/boot/grub
GRUB
grub-mkimage -d "$efi" -O x86_64-efi -p /boot/grub -c "$work/early.cfg" \
    -o "$work/bootx64.efi" part_gpt part_msdos fat search search_label "${common[@]}"
esp=$disk@@$MiB
mformat -i "$esp" -v TGESP -T $((esp_mib * 2048)) -h 16 -s 32 ::
mmd -i "$esp" ::/EFI ::/EFI/BOOT
mcopy -i "$esp" "$work/bootx64.efi" ::/EFI/BOOT/BOOTX64.EFI
mv "$disk" "$out/boot-efi.raw"
