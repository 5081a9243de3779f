//! What `bivisor run` says of a file that a machine could start: a kernel, a CD image, a boot sector.

use bivisor_emulator::machine::boot::{self, Kind};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Where multiboot 2's header must be, and with it everything that is looked at.
const HEAD: u64 = 0x9000;

/// Is it an ELF file whose first segment belongs where kernels are, in the upper half of the addresses?
fn is_kernel(head: &[u8]) -> bool {
    let long = |at: usize| head.get(at..at + 8).map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes")));
    let first = long(32).and_then(|at| usize::try_from(at).ok()).and_then(|at| at.checked_add(16)).and_then(long);
    head.get(4) == Some(&2) && first.is_some_and(|address| address >> 63 != 0)
}

/// A file that is no Linux program: what it is, and the command that starts it. Empty if it is nothing that starts.
pub fn hint(path: &Path) -> String {
    let mut head = Vec::new();
    let read = File::open(path).and_then(|f| f.take(HEAD).read_to_end(&mut head));
    // Reading a file without end, or a directory, tells nothing.
    if read.is_err() || !path.is_file() {
        return String::new();
    }
    let (what, option) = match boot::kind(&head) {
        Some(Kind::BzImage) => ("a Linux kernel", "--kernel"),
        Some(Kind::Multiboot | Kind::Multiboot2) => ("a multiboot kernel", "--kernel"),
        Some(Kind::Elf) if is_kernel(&head) => ("a kernel", "--kernel"),
        _ if head.get(0x8001..0x8006) == Some(b"CD001") => ("a CD image", "--cdrom"),
        None if head.starts_with(b"QFI\xfb") => ("a disk image", "--drive file="),
        None if head.get(510..512) == Some(&[0x55, 0xaa]) => {
            ("a disk image with a boot sector", "--drive if=ide,file=")
        }
        _ => return String::new(),
    };
    let space = if option.ends_with('=') { "" } else { " " };
    format!("; it is {what}: use `bivisor boot {option}{space}{}`", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_where_kernels_are() {
        let mut head = vec![0; 0x100];
        head[..5].copy_from_slice(b"\x7fELF\x02");
        head[32] = 0x40;
        head[0x50..0x58].copy_from_slice(&0xffff_ffff_8100_0000u64.to_le_bytes());
        assert!(is_kernel(&head));
        head[0x57] = 0;
        assert!(!is_kernel(&head));
        assert!(!is_kernel(&head[..0x30]));
    }
}
