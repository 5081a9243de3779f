#!/bin/sh
# Fetches the guests that `bivisor boot` is tried with (docs/guests.md), as Debian packages, into a directory: kernels, SeaBIOS, memtest86+,
# iPXE, and an initramfs of busybox whose /init runs a script of commands and turns the machine off. Nothing of it is ever committed.
set -eu
if [ $# -ne 1 ]; then
    echo "usage: $0 DIRECTORY" >&2
    exit 2
fi
for tool in apt-get dpkg-deb cpio gzip; do
    command -v "$tool" >/dev/null || { echo "$0: needs $tool" >&2; exit 1; }
done
mkdir -p "$1/packages"
here=$(cd "$(dirname "$0")" && pwd)
cd "$1"

# The package that a metapackage depends on.
newest() {
    apt-cache depends "$1" | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1
}

fetch() {
    (cd packages && apt-get download "$1" >/dev/null)
    rm -rf "unpacked-$2"
    dpkg-deb -x packages/"$1"_*.deb "unpacked-$2"
}

for flavour in cloud-amd64 amd64; do
    fetch "$(newest "linux-image-$flavour")" "$flavour"
    cp unpacked-"$flavour"/boot/vmlinuz-* "vmlinuz-${flavour%-amd64}"
done
fetch seabios bios
cp unpacked-bios/usr/share/seabios/bios.bin unpacked-bios/usr/share/seabios/bios-256k.bin .
cp unpacked-bios/usr/share/seabios/vgabios-isavga.bin .
fetch memtest86+ memtest
cp unpacked-memtest/boot/memtest86+x64.bin .
fetch ipxe ipxe
cp unpacked-ipxe/usr/lib/ipxe/ipxe.iso .

# An initramfs of the busybox under one directory, under one name.
initramfs() {
    rm -rf root
    mkdir -p root/bin root/proc root/sys root/dev root/tmp
    cp "$1/bin/busybox" root/bin/
    cp "$here/guests/init.sh" root/init
    chmod 755 root/init
    (cd root && find . | cpio -o -H newc 2>/dev/null | gzip -9) >"$2"
}
fetch busybox-static busybox
initramfs unpacked-busybox initramfs.gz

# The 32-bit kernel, by package lists of its own, so that the system need not know that architecture.
lists=$PWD/apt
i386() {
    tool=$1
    shift
    "$tool" -o Dir::State="$lists/state" -o Dir::State::status=/dev/null -o Dir::Cache="$lists/cache" \
        -o APT::Architecture=i386 -o APT::Architectures::=i386 "$@"
}
mkdir -p apt/state/lists/partial apt/cache/archives/partial packages-i386
i386 apt-get update >/dev/null 2>&1 || true
kernel=$(i386 apt-cache depends linux-image-686-pae | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1)
if [ -n "$kernel" ] && (cd packages-i386 && i386 apt-get download "$kernel" busybox-static >/dev/null); then
    rm -rf unpacked-i386
    for package in packages-i386/*.deb; do
        dpkg-deb -x "$package" unpacked-i386
    done
    cp unpacked-i386/boot/vmlinuz-* vmlinuz-686
    initramfs unpacked-i386 initramfs-686.gz
else
    echo "$0: no i386 packages are to be had; without vmlinuz-686" >&2
fi

# A CD of GRUB with the cloud kernel, its console on the screen and on the serial line.
if command -v grub-mkrescue >/dev/null && command -v xorriso >/dev/null && command -v mformat >/dev/null; then
    rm -rf cd
    mkdir -p cd/boot/grub
    cp vmlinuz-cloud initramfs.gz memtest86+x64.bin cd/boot/
    cp "$here/guests/grub.cfg" cd/boot/grub/
    grub-mkrescue -o grub.iso cd >/dev/null 2>&1
else
    echo "$0: without grub.iso, which needs grub-common, grub-pc-bin, xorriso and mtools" >&2
fi
echo "In $1: $(echo vmlinuz-* *.gz *.bin *.iso). Now:"
echo "  bivisor boot --kernel $1/vmlinuz-cloud --initrd $1/initramfs.gz --append 'console=ttyS0 quiet'"
echo "  BIVISOR_GUESTS=$1 cargo test --release --test guests -- --nocapture"
