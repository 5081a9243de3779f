//! The initial stack: argument strings, environment, auxiliary vector (System V ABI 3.4.1, figure 3.9; getauxval(3)).

use crate::cpu::cpuid::CpuModel;
use crate::cpu::{CpuState, Cr4};
use crate::linux::elf::Loaded;
use crate::linux::host;
use crate::mem::PAGE_SIZE;
use std::ffi::{OsStr, OsString};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;

/// Types of auxiliary entries.
#[allow(missing_docs)]
pub mod at {
    pub const NULL: u64 = 0;
    pub const PHDR: u64 = 3;
    pub const PHENT: u64 = 4;
    pub const PHNUM: u64 = 5;
    pub const PAGESZ: u64 = 6;
    pub const BASE: u64 = 7;
    pub const FLAGS: u64 = 8;
    pub const ENTRY: u64 = 9;
    pub const UID: u64 = 11;
    pub const EUID: u64 = 12;
    pub const GID: u64 = 13;
    pub const EGID: u64 = 14;
    pub const PLATFORM: u64 = 15;
    pub const HWCAP: u64 = 16;
    pub const CLKTCK: u64 = 17;
    pub const SECURE: u64 = 23;
    pub const RANDOM: u64 = 25;
    pub const HWCAP2: u64 = 26;
    pub const EXECFN: u64 = 31;
    pub const SYSINFO_EHDR: u64 = 33;
    pub const MINSIGSTKSZ: u64 = 51;
}

/// What goes on the stack.
pub struct Stack<'a> {
    /// argv.
    pub args: &'a [OsString],
    /// envp.
    pub env: &'a [OsString],
    /// The name the program was started by.
    pub name: &'a OsStr,
    /// For AT_RANDOM.
    pub random: [u8; 16],
    /// The auxiliary vector without the entries that are pointers into the stack, in order.
    pub aux: Vec<(u64, u64)>,
}

/// Where the parts of a built stack are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placed {
    /// The initial RSP.
    pub sp: u64,
    /// The argument strings.
    pub args: Range<u64>,
    /// The environment strings.
    pub env: Range<u64>,
    /// The auxiliary vector.
    pub aux: Range<u64>,
}

/// The auxiliary vector in the kernel's order. Entries that the host's kernel does not give are left out.
pub fn aux_vector(program: &Loaded, base: u64, cpu: &CpuModel) -> Vec<(u64, u64)> {
    let host = |kind: u64| (kind, host::aux(kind));
    let all = [
        host(at::SYSINFO_EHDR),
        host(at::MINSIGSTKSZ),
        // CPUID.1:EDX.
        (at::HWCAP, u64::from(cpu.cpuid(&CpuState::long64(3), 1, 0)[3])),
        (at::PAGESZ, PAGE_SIZE),
        host(at::CLKTCK),
        (at::PHDR, program.phdr),
        (at::PHENT, 56),
        (at::PHNUM, program.phnum),
        (at::BASE, base),
        (at::FLAGS, 0),
        (at::ENTRY, program.entry),
        host(at::UID),
        host(at::EUID),
        host(at::GID),
        host(at::EGID),
        // Set-user-id bits have no effect here.
        (at::SECURE, 0),
        // Bit 1: FSGSBASE instructions are allowed.
        (at::HWCAP2, u64::from(cpu.cr4().contains(Cr4::FSGSBASE)) << 1),
    ];
    all.into_iter().filter(|&(kind, v)| v != 0 || !matches!(kind, at::SYSINFO_EHDR | at::MINSIGSTKSZ)).collect()
}

impl Stack<'_> {
    /// The stack that ends at `top`: where its parts are, and the bytes from RSP (where argc is) up.
    pub fn build(&self, top: u64) -> (Placed, Vec<u8>) {
        // From the top down: eight zero bytes, the name, the environment, the arguments, the platform, the random bytes.
        let mut down = Down { at: top, pieces: Vec::new() };
        down.push(&[0; 8]);
        let name = down.push_string(self.name);
        let mut strings = |all: &[OsString]| -> Vec<u64> {
            let mut at: Vec<u64> = all.iter().rev().map(|s| down.push_string(s)).collect();
            at.reverse();
            at
        };
        let env = strings(self.env);
        let args = strings(self.args);
        let env_end = name;
        let args_end = env.first().copied().unwrap_or(env_end);
        let args_start = args.first().copied().unwrap_or(args_end);
        let platform = down.push_string(OsStr::new("x86_64"));
        let random = down.push(&self.random);
        let mut words = vec![args.len() as u64];
        words.extend(&args);
        words.push(0);
        words.extend(&env);
        words.push(0);
        let aux_words = words.len() as u64;
        let pointers = [(at::RANDOM, random), (at::EXECFN, name), (at::PLATFORM, platform), (at::NULL, 0)];
        words.extend(self.aux.iter().chain(&pointers).flat_map(|&(k, v)| [k, v]));
        // RSP is 16-byte aligned at the entry (ABI 3.4.1).
        let sp = (down.at - 8 * words.len() as u64) & !15;
        let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        bytes.resize((down.at - sp) as usize, 0);
        for piece in down.pieces.iter().rev() {
            bytes.extend_from_slice(piece);
        }
        let aux = sp + 8 * aux_words..sp + 8 * words.len() as u64;
        (Placed { sp, args: args_start..args_end, env: args_end..env_end, aux }, bytes)
    }
}

struct Down {
    at: u64,
    pieces: Vec<Vec<u8>>,
}

impl Down {
    fn push(&mut self, bytes: &[u8]) -> u64 {
        self.pieces.push(bytes.to_vec());
        self.at -= bytes.len() as u64;
        self.at
    }

    fn push_string(&mut self, s: &OsStr) -> u64 {
        // An argument cannot hold a NUL; a caller's mistake must not shift what follows.
        let text = s.as_bytes().split(|&c| c == 0).next().unwrap_or_default();
        self.push(&[text, &[0]].concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout() {
        let args = ["ls".into(), "-l".into()];
        let env = ["A=1".into()];
        let aux = vec![(at::PAGESZ, 4096)];
        let stack = Stack { args: &args, env: &env, name: OsStr::new("/bin/ls"), random: [7; 16], aux };
        let top = 0x7000_0000;
        let (placed, bytes) = stack.build(top);
        let sp = placed.sp;
        assert_eq!((sp % 16, sp + bytes.len() as u64), (0, top));
        let word = |i: usize| u64::from_le_bytes(bytes[8 * i..8 * i + 8].try_into().unwrap());
        let text = |addr: u64| {
            let from = (addr - sp) as usize;
            String::from_utf8(bytes[from..].split(|&c| c == 0).next().unwrap().to_vec()).unwrap()
        };
        assert_eq!(word(0), 2);
        assert_eq!([text(word(1)), text(word(2))], ["ls", "-l"]);
        assert_eq!(word(3), 0);
        assert_eq!(text(word(4)), "A=1");
        assert_eq!(word(5), 0);
        let mut aux = std::collections::HashMap::new();
        let mut i = 6;
        while word(i) != at::NULL {
            aux.insert(word(i), word(i + 1));
            i += 2;
        }
        assert_eq!(aux[&at::PAGESZ], 4096);
        assert_eq!(&bytes[(placed.args.start - sp) as usize..(placed.args.end - sp) as usize], b"ls\0-l\0");
        assert_eq!(&bytes[(placed.env.start - sp) as usize..(placed.env.end - sp) as usize], b"A=1\0");
        assert_eq!((placed.aux.start, placed.aux.end), (sp + 8 * 6, sp + 8 * (i as u64 + 2)));
        assert_eq!(text(aux[&at::EXECFN]), "/bin/ls");
        assert_eq!(text(aux[&at::PLATFORM]), "x86_64");
        let random = (aux[&at::RANDOM] - sp) as usize;
        assert_eq!(bytes[random..random + 16], [7; 16]);
        assert_eq!(bytes[bytes.len() - 8..], [0; 8]);
    }
}
