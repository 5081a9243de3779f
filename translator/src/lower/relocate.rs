//! Moving lowered code: the same guest code at another guest address, in another place of the host.
//!
//! A block of guest code says nothing of where it lies but relative to itself (SDM 2A 2.2.1.6, JMP, CALL), so all that depends on its
//! address moves with it. Jumps to other blocks are not moved but linked anew; landings are made anew.

use crate::lower::stub_before;

/// What a field of host code depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depends {
    /// Nothing to be done here, but the code is good at this guest address only: an address in a short form.
    Fixed,
    /// 8 bytes: a guest address.
    Guest,
    /// 4 bytes: a displacement from host code to a guest address.
    Distance,
    /// 4 bytes: a displacement to the stub of the block's exit of this ordinal.
    Stub(u16),
}

impl Depends {
    /// As a number.
    pub fn pack(self) -> u16 {
        match self {
            Depends::Fixed => 0,
            Depends::Guest => 1,
            Depends::Distance => 2,
            Depends::Stub(n) => 3 + n,
        }
    }

    /// What a number stands for.
    pub fn unpack(v: u16) -> Depends {
        match v {
            0 => Depends::Fixed,
            1 => Depends::Guest,
            2 => Depends::Distance,
            n => Depends::Stub(n - 3),
        }
    }
}

/// A field of lowered code that depends on where code lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relocation {
    /// Its offset.
    pub at: u16,
    /// On what.
    pub depends: Depends,
}

/// Changes `code` so that it can lie `host` bytes further on and be the code of a guest `guest` bytes further on; `place` is its new
/// host address, `stubs` the end of the stubs, `first_exit` the number of its first exit. False if that cannot be.
pub fn move_code(
    code: &mut [u8],
    relocations: &[Relocation],
    (host, guest): (u64, u64),
    place: u64,
    (stubs, first_exit): (u64, u32),
) -> bool {
    relocations.iter().all(|r| move_field(code, *r, (host, guest), place, (stubs, first_exit)).is_some())
}

fn move_field(
    code: &mut [u8],
    r: Relocation,
    (host, guest): (u64, u64),
    place: u64,
    (stubs, first_exit): (u64, u32),
) -> Option<()> {
    let at = usize::from(r.at);
    match r.depends {
        Depends::Fixed => (guest == 0).then_some(()),
        Depends::Guest => {
            let field: &mut [u8; 8] = code.get_mut(at..at + 8)?.try_into().ok()?;
            *field = u64::from_le_bytes(*field).wrapping_add(guest).to_le_bytes();
            Some(())
        }
        Depends::Distance => {
            let field: &mut [u8; 4] = code.get_mut(at..at + 4)?.try_into().ok()?;
            let old = i64::from(i32::from_le_bytes(*field));
            let new = old.wrapping_add(guest.wrapping_sub(host) as i64);
            *field = i32::try_from(new).ok()?.to_le_bytes();
            Some(())
        }
        Depends::Stub(ordinal) => {
            let field: &mut [u8; 4] = code.get_mut(at..at + 4)?.try_into().ok()?;
            let stub = stub_before(stubs, first_exit.checked_add(u32::from(ordinal))?);
            let from = place.wrapping_add(at as u64 + 4);
            *field = (stub.wrapping_sub(from) as u32).to_le_bytes();
            Some(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{CodeSource, MAX_INSNS, Opened, Scratch};
    use crate::lower::{Leave, Surroundings, Unit, lower};
    use crate::marks::Home;
    use crate::route::{Policy, Routes};
    use bivisor_emulator::cpu::cpuid::CpuModel;
    use std::sync::Arc;

    struct Text<'a>(u64, &'a [u8]);

    impl CodeSource for Text<'_> {
        fn open(&mut self, _: u64) -> Opened {
            Opened::Watched
        }
        fn read(&mut self, at: u64, to: &mut [u8]) -> bool {
            let Some(from) = self.1.get((at - self.0) as usize..) else { return false };
            let n = from.len().min(to.len());
            to.fill(0);
            to[..n].copy_from_slice(&from[..n]);
            n > 0
        }
        fn epoch(&self) -> u64 {
            0
        }
    }

    fn lowered(text: &[u8], routes: &Routes, offset: u64, guest: u64, host: u64, first_exit: u32) -> Option<Unit> {
        let mut scratch = Scratch::default();
        if !scratch.decode(&mut Text(guest, text), guest + offset, routes, MAX_INSNS) {
            return None;
        }
        let around = Surroundings {
            at: host,
            first_exit,
            stubs: host + 0x40_0000,
            miss: host,
            home: Home::Slot,
            known: &|_, _| None,
            linked: true,
        };
        Some(lower(&scratch.block, &around, false, Unit::default()))
    }

    /// Code of this program itself, lowered at two places, is the same once the one is moved to the other.
    #[test]
    fn moved_code_is_what_lowering_gives_there() {
        let program = std::fs::read("/proc/self/exe").expect("this program");
        let routes = Routes::new(Arc::new(CpuModel::host()), Policy::default());
        let (mut blocks, mut far, mut fixed, mut forms) = (0, 0, 0, 0);
        // The middle of the file is code.
        let text = &program[(program.len() / 4) & !4095..][..1 << 20];
        // Near the guest, so that displacements reach; far from it; and where a guest has addresses of 32 bits.
        for (guest, host) in
            [(0x7f00_0000_0000, 0x7f00_2000_0000), (0x5500_0000_0000, 0x7f00_0000_0000), (0x40_0000, 0x7f00_0000_0000)]
        {
            let (d_guest, d_host) = (0x1234_5000u64, 0x333_0040u64);
            let mut at = 0;
            while at < text.len() as u64 - 4096 {
                at += 61;
                let Some(mut one) = lowered(text, &routes, at, guest, host, 7) else { continue };
                let two = lowered(text, &routes, at, guest + d_guest, host + d_host, 1000).expect("the same code");
                let place = host + d_host;
                let moved =
                    move_code(&mut one.code, &one.relocations, (d_host, d_guest), place, (place + 0x40_0000, 1000));
                if !moved {
                    fixed += 1;
                    let cause = |r: &Relocation| matches!(r.depends, Depends::Fixed | Depends::Distance);
                    assert!(one.relocations.iter().any(cause));
                    continue;
                }
                // The jumps are linked anew.
                let without_jumps = |unit: &Unit| {
                    let mut code = unit.code.clone();
                    for e in unit.exits.iter().filter(|e| matches!(e.leave, Leave::To(_)) && !e.short) {
                        code[e.site as usize..][..4].fill(0);
                    }
                    code
                };
                let (one, other) = (Unit { code: without_jumps(&one), ..one }, without_jumps(&two));
                if one.code.len() != other.len() || one.relocations != two.relocations {
                    // A far operand here, a near one there: both are right. Alignment can make them equally long.
                    forms += 1;
                    continue;
                }
                assert_eq!(one.code, other, "at {at:#x} of guest {guest:#x}: {:?}", one.relocations);
                blocks += 1;
                far += u32::from(one.relocations.iter().any(|r| r.depends == Depends::Guest));
            }
        }
        assert!(blocks > 10_000 && far > 1000 && fixed > 100 && forms < blocks / 10, "{blocks} {far} {fixed} {forms}");
    }
}
