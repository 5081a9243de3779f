//! The page walk: a function of the control registers and of memory (SDM 3A 4.3 to 4.8).
//!
//! All forms: 32-bit, PAE, 4-level, 5-level. Accessed and dirty flags are set, atomically, only when the access is allowed. The
//! PDPTEs of PAE paging are read at each walk, as AMD's processors do, and not held in registers since the write of CR3; where the offered
//! CPU is Intel's they are at least checked then.

use crate::cpu::cpuid::PHYSICAL_BITS;
use crate::cpu::{CpuState, Cr0, Cr4, Efer, Fault, Rflags};
use crate::isa::Width;
use crate::mem::{Access, By, GuestMemory};

use flag::{A, D, G, P, PS, RW, US, XD};

/// Flags of the entries of tables (SDM 3A tables 4-14 to 4-20).
pub mod flag {
    /// Present.
    pub const P: u64 = 1;
    /// May be stored to.
    pub const RW: u64 = 1 << 1;
    /// May be accessed by user code.
    pub const US: u64 = 1 << 2;
    /// Accessed.
    pub const A: u64 = 1 << 5;
    /// Dirty.
    pub const D: u64 = 1 << 6;
    /// Maps a large page.
    pub const PS: u64 = 1 << 7;
    /// Global.
    pub const G: u64 = 1 << 8;
    /// Execute-disable.
    pub const XD: u64 = 1 << 63;
}

/// Bits of a page fault's error code (SDM 3A 4.7).
pub mod code {
    /// The page is present: a violation of rights or reserved bits.
    pub const P: u16 = 1;
    /// A write.
    pub const W: u16 = 2;
    /// An access at CPL 3.
    pub const U: u16 = 4;
    /// A reserved bit was set in an entry.
    pub const RSVD: u16 = 8;
    /// An instruction fetch (with NX or SMEP enabled).
    pub const I: u16 = 16;
}

/// A linear page and what may be done with it, all levels combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Guest-physical address of the 4 KiB that hold the linear address.
    pub gpa: u64,
    /// Size of the whole page: 4 KiB, 2 MiB, 4 MiB or 1 GiB.
    pub size: u64,
    /// User-mode address: U/S set at every level.
    pub user: bool,
    /// R/W set at every level.
    pub write: bool,
    /// XD clear at every level.
    pub execute: bool,
    /// Global.
    pub global: bool,
    /// The leaf's dirty flag.
    pub dirty: bool,
    /// The accessed flags of all levels.
    pub accessed: bool,
}

/// One form of paging.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Bits32,
    Pae,
    /// 4 or 5 levels.
    Long(u32),
}

impl Form {
    fn of(cpu: &CpuState) -> Form {
        if cpu.efer.contains(Efer::LMA) {
            Form::Long(if cpu.cr4.contains(Cr4::LA57) { 5 } else { 4 })
        } else if cpu.cr4.contains(Cr4::PAE) {
            Form::Pae
        } else {
            Form::Bits32
        }
    }

    fn levels(self) -> u32 {
        match self {
            Form::Bits32 => 2,
            Form::Pae => 3,
            Form::Long(n) => n,
        }
    }

    fn entry_width(self) -> Width {
        if self == Form::Bits32 { Width::D } else { Width::Q }
    }

    /// Where the root table is (SDM 3A tables 4-3, 4-7, 4-12).
    fn root(self, cr3: u64) -> u64 {
        match self {
            Form::Bits32 => cr3 & 0xffff_f000,
            Form::Pae => cr3 & 0xffff_ffe0,
            Form::Long(_) => cr3 & address_mask(),
        }
    }

    /// Number of low linear-address bits below the index of `level` (1 = page table).
    fn shift(self, level: u32) -> u32 {
        12 + (level - 1) * if self == Form::Bits32 { 10 } else { 9 }
    }

    fn index(self, laddr: u64, level: u32) -> u64 {
        let mask = match (self, level) {
            (Form::Bits32, _) => 0x3ff,
            (Form::Pae, 3) => 3,
            _ => 0x1ff,
        };
        laddr >> self.shift(level) & mask
    }
}

/// Is a reserved bit set in a present PDPTE of PAE paging? Intel's processors load all four with CR3 and refuse such (SDM 3A 4.4.1).
pub fn bad_pdpte(cpu: &CpuState, mem: &GuestMemory, cr3: u64) -> bool {
    (0..4).any(|n| {
        let entry = mem.load(Form::Pae.root(cr3) + 8 * n, Width::Q).unwrap_or(u64::MAX);
        entry & P != 0 && entry & (reserved(cpu, Form::Pae, 3, false) | XD) != 0
    })
}

/// Bits MAXPHYADDR-1:12 of an entry.
fn address_mask() -> u64 {
    (1 << PHYSICAL_BITS) - 0x1000
}

/// The entries that a walk used, highest level first.
struct Path {
    entries: [(u64, u64); 5],
    len: usize,
}

/// Why there is no page: the P and RSVD bits of the error code.
struct Missing(u16);

/// Follows the tables without changing them.
fn look_up(cpu: &CpuState, mem: &GuestMemory, laddr: u64) -> Result<(Page, Path), Missing> {
    match Form::of(cpu) {
        // Compiled by itself: every level is a constant.
        form @ Form::Long(4) => look_up_by(form, cpu, mem, laddr),
        form => look_up_by(form, cpu, mem, laddr),
    }
}

#[inline(always)]
fn look_up_by(form: Form, cpu: &CpuState, mem: &GuestMemory, laddr: u64) -> Result<(Page, Path), Missing> {
    let mut table = form.root(cpu.cr3);
    let mut path = Path { entries: [(0, 0); 5], len: 0 };
    let (mut user, mut write, mut execute, mut accessed) = (true, true, true, true);
    for level in (1..=form.levels()).rev() {
        let at = table + form.index(laddr, level) * form.entry_width().bytes();
        // Where no RAM is the bus would answer all ones: reserved bits.
        let entry = mem.load(at, form.entry_width()).unwrap_or(u64::MAX);
        if entry & P == 0 {
            return Err(Missing(0));
        }
        let leaf = is_leaf(cpu, form, level, entry);
        if entry & reserved(cpu, form, level, leaf) != 0 {
            return Err(Missing(code::P | code::RSVD));
        }
        // PDPTEs of PAE paging hold no rights and no accessed flag.
        if !(form == Form::Pae && level == 3) {
            user &= entry & US != 0;
            write &= entry & RW != 0;
            execute &= entry & XD == 0 || form == Form::Bits32;
            accessed &= entry & A != 0;
            path.entries[path.len] = (at, entry);
            path.len += 1;
        }
        if leaf {
            let size = 1 << form.shift(level);
            let base = leaf_base(form, level, entry) & !(size - 1);
            let page = Page {
                gpa: (base | laddr & (size - 1)) & !0xfff,
                size,
                user,
                write,
                execute,
                global: entry & G != 0 && cpu.cr4.contains(Cr4::PGE),
                dirty: entry & D != 0,
                accessed,
            };
            return Ok((page, path));
        }
        table = entry & if form == Form::Bits32 { 0xffff_f000 } else { address_mask() };
    }
    // The loop always ends at level 1, which is a leaf.
    Err(Missing(0))
}

fn is_leaf(cpu: &CpuState, form: Form, level: u32, entry: u64) -> bool {
    match (form, level) {
        (_, 1) => true,
        (Form::Bits32, 2) => entry & PS != 0 && cpu.cr4.contains(Cr4::PSE),
        (Form::Pae, 2) | (Form::Long(_), 2 | 3) => entry & PS != 0,
        _ => false,
    }
}

/// Bits that must be zero in a present entry (SDM 3A 4.3 to 4.5).
fn reserved(cpu: &CpuState, form: Form, level: u32, leaf: bool) -> u64 {
    if form == Form::Bits32 {
        // PSE-36: bits 20:13 are address bits 39:32.
        return if level == 2 && leaf { 1 << 21 } else { 0 };
    }
    let mut bits = 0x000f_ffff_ffff_f000 & !address_mask();
    if !cpu.efer.contains(Efer::NXE) {
        bits |= XD;
    }
    match (form, level) {
        (Form::Pae, 3) => return 0x1e6 | 0xfff0_0000_0000_0000 | bits,
        (Form::Pae, _) => bits |= 0x7ff0_0000_0000_0000,
        (Form::Long(_), 4 | 5) => bits |= PS,
        _ => {}
    }
    match (leaf, level) {
        (true, 2) => bits | 0x001f_e000,
        (true, 3) => bits | 0x3fff_e000,
        _ => bits,
    }
}

fn leaf_base(form: Form, level: u32, entry: u64) -> u64 {
    match (form, level) {
        (Form::Bits32, 2) => entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32,
        (Form::Bits32, _) => entry & 0xffff_f000,
        _ => entry & address_mask(),
    }
}

/// May the access be made (SDM 3A 4.6.1)?
pub fn allowed(cpu: &CpuState, page: &Page, access: Access, by: By) -> bool {
    if by == By::User {
        return page.user
            && match access {
                Access::Read => true,
                Access::Write => page.write,
                Access::Execute => page.execute,
            };
    }
    // RFLAGS.AC lifts SMAP for explicit accesses.
    let smap = page.user && cpu.cr4.contains(Cr4::SMAP) && !(by == By::Supervisor && cpu.rflags.contains(Rflags::AC));
    match access {
        Access::Read => !smap,
        Access::Write => !smap && (page.write || !cpu.cr0.contains(Cr0::WP)),
        Access::Execute => page.execute && !(page.user && cpu.cr4.contains(Cr4::SMEP)),
    }
}

fn fault(cpu: &CpuState, laddr: u64, access: Access, by: By, cause: u16) -> Fault {
    let mut bits = cause;
    if access == Access::Write {
        bits |= code::W;
    }
    if by == By::User {
        bits |= code::U;
    }
    // SDM 3A 4.7: I/D only if NX or SMEP can be the reason.
    let nx = cpu.efer.contains(Efer::NXE) && cpu.cr4.contains(Cr4::PAE);
    if access == Access::Execute && (nx || cpu.cr4.contains(Cr4::SMEP)) {
        bits |= code::I;
    }
    Fault::Pf { addr: laddr, code: bits }
}

/// Walks the tables for an access: finds the page, checks the rights, sets accessed and dirty flags.
///
/// # Errors
/// The page fault; then nothing was changed.
pub fn walk(cpu: &CpuState, mem: &GuestMemory, laddr: u64, access: Access, by: By) -> Result<Page, Fault> {
    loop {
        let (mut page, path) =
            look_up(cpu, mem, laddr).map_err(|Missing(cause)| fault(cpu, laddr, access, by, cause))?;
        if !allowed(cpu, &page, access, by) {
            return Err(fault(cpu, laddr, access, by, code::P));
        }
        if set_flags(cpu, mem, &path, access) {
            page.dirty |= access == Access::Write;
            return Ok(page);
        }
    }
}

/// Sets A in every entry, D in the leaf for a write. False if somebody changed an entry meanwhile: walk again.
fn set_flags(cpu: &CpuState, mem: &GuestMemory, path: &Path, access: Access) -> bool {
    let w = Form::of(cpu).entry_width();
    path.entries[..path.len].iter().enumerate().all(|(i, &(at, entry))| {
        let dirty = if access == Access::Write && i + 1 == path.len { D } else { 0 };
        let new = entry | A | dirty;
        new == entry || mem.compare_exchange(at, w, entry, new) == Some(entry)
    })
}

/// The page of a linear address as the tables have it: no rights are checked and nothing is changed.
pub fn peek(cpu: &CpuState, mem: &GuestMemory, laddr: u64) -> Option<Page> {
    look_up(cpu, mem, laddr).ok().map(|(page, _)| page)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::Ram;

    const ROOT: u64 = 0x1000;
    const L3: u64 = 0x2000;
    const L2: u64 = 0x3000;
    const L1: u64 = 0x4000;
    const LADDR: u64 = 0x5123;

    /// LADDR is page 5; its leaf is at L1 + 5 * 8, pointing to 0x9000.
    fn setup(leaf: u64) -> (CpuState, GuestMemory) {
        let mem = GuestMemory::Ram(Ram::new(1 << 20).expect("1 MiB"));
        for (at, v) in [(ROOT, L3 | 7), (L3, L2 | 7), (L2, L1 | 7), (L1 + 40, leaf)] {
            mem.store(at, Width::Q, v).expect("in RAM");
        }
        let mut cpu = CpuState::long64(0);
        cpu.cr3 = ROOT;
        (cpu, mem)
    }

    fn entry(mem: &GuestMemory, at: u64) -> u64 {
        mem.load(at, Width::Q).expect("in RAM")
    }

    fn pf(code: u16) -> Result<u64, Fault> {
        Err(Fault::Pf { addr: LADDR, code })
    }

    fn gpa(cpu: &CpuState, mem: &GuestMemory, access: Access, by: By) -> Result<u64, Fault> {
        walk(cpu, mem, LADDR, access, by).map(|p| p.gpa)
    }

    #[test]
    fn error_codes_of_the_manual() {
        use Access::{Execute, Read, Write};
        use By::{Supervisor, User};
        // leaf, access, by, expected; long mode with NXE and WP.
        let rows: &[(u64, Access, By, Result<u64, Fault>)] = &[
            (0x9007, Read, User, Ok(0x9000)),
            (0x9007, Write, User, Ok(0x9000)),
            (0x9007, Execute, User, Ok(0x9000)),
            (0x9006, Read, User, pf(4)),
            (0x9006, Write, User, pf(6)),
            (0x9006, Execute, User, pf(20)),
            (0x9006, Read, Supervisor, pf(0)),
            (0x9005, Write, User, pf(7)),
            (0x9005, Write, Supervisor, pf(3)),
            (0x9003, Read, User, pf(5)),
            (0x9003, Execute, User, pf(21)),
            (XD | 0x9007, Execute, User, pf(21)),
            (XD | 0x9007, Execute, Supervisor, pf(17)),
            (XD | 0x9007, Read, User, Ok(0x9000)),
            (1 << 50 | 0x9007, Read, User, pf(13)),
            (1 << 50 | 0x9007, Write, Supervisor, pf(11)),
            (1 << 50 | 0x9007, Execute, User, pf(29)),
        ];
        for &(leaf, access, by, expected) in rows {
            let (cpu, mem) = setup(leaf);
            assert_eq!(gpa(&cpu, &mem, access, by), expected, "{leaf:#x} {access:?} {by:?}");
        }
    }

    #[test]
    fn without_nxe_the_bit_is_reserved_and_fetches_are_not_told() {
        let (mut cpu, mem) = setup(XD | 0x9007);
        cpu.efer -= Efer::NXE;
        assert_eq!(gpa(&cpu, &mem, Access::Execute, By::User), pf(13));
        cpu.cr4 |= Cr4::SMEP;
        assert_eq!(gpa(&cpu, &mem, Access::Execute, By::User), pf(29));
    }

    #[test]
    fn write_protect_smep_and_smap() {
        let (mut cpu, mem) = setup(0x9005);
        cpu.cr0 -= Cr0::WP;
        assert_eq!(gpa(&cpu, &mem, Access::Write, By::Supervisor), Ok(0x9000));
        assert_eq!(gpa(&cpu, &mem, Access::Write, By::User), pf(7));
        assert_eq!(gpa(&cpu, &mem, Access::Execute, By::Supervisor), Ok(0x9000));
        cpu.cr4 |= Cr4::SMEP | Cr4::SMAP;
        assert_eq!(gpa(&cpu, &mem, Access::Execute, By::Supervisor), pf(17));
        assert_eq!(gpa(&cpu, &mem, Access::Read, By::Supervisor), pf(1));
        assert_eq!(gpa(&cpu, &mem, Access::Read, By::User), Ok(0x9000));
        cpu.rflags |= Rflags::AC;
        assert_eq!(gpa(&cpu, &mem, Access::Read, By::Supervisor), Ok(0x9000));
        assert_eq!(gpa(&cpu, &mem, Access::Read, By::Implicit), pf(1));
    }

    #[test]
    fn rights_are_those_of_all_levels() {
        for (at, cleared) in [(ROOT, RW), (L3, US), (L2, RW), (L1 + 40, US)] {
            let (cpu, mem) = setup(0x9007);
            mem.store(at, Width::Q, entry(&mem, at) & !cleared).expect("in RAM");
            assert_eq!(gpa(&cpu, &mem, Access::Write, By::User), pf(7), "{at:#x}");
        }
    }

    #[test]
    fn flags_are_set_only_by_an_access_that_succeeds() {
        let (cpu, mem) = setup(0x9005);
        assert_eq!(gpa(&cpu, &mem, Access::Write, By::User), pf(7));
        assert_eq!([ROOT, L3, L2, L1 + 40].map(|at| entry(&mem, at) & (A | D)), [0; 4]);
        assert_eq!(gpa(&cpu, &mem, Access::Read, By::User), Ok(0x9000));
        assert_eq!([ROOT, L3, L2, L1 + 40].map(|at| entry(&mem, at) & (A | D)), [A; 4]);
        let (cpu, mem) = setup(0x9007);
        assert_eq!(gpa(&cpu, &mem, Access::Write, By::User), Ok(0x9000));
        assert_eq!([ROOT, L3, L2, L1 + 40].map(|at| entry(&mem, at) & (A | D)), [A, A, A, A | D]);
    }

    #[test]
    fn large_pages_and_their_reserved_bits() {
        let (cpu, mem) = setup(0);
        mem.store(L2, Width::Q, 0x0040_0087).expect("in RAM");
        let page = walk(&cpu, &mem, 0x12_3456, Access::Read, By::User).expect("mapped");
        assert_eq!((page.gpa, page.size), (0x52_3000, 2 << 20));
        // Bit 12 is PAT, bit 13 is reserved.
        mem.store(L2, Width::Q, 0x0040_1087).expect("in RAM");
        assert!(walk(&cpu, &mem, 0x12_3456, Access::Read, By::User).is_ok());
        mem.store(L2, Width::Q, 0x0040_2087).expect("in RAM");
        assert_eq!(gpa(&cpu, &mem, Access::Read, By::User), pf(13));
        mem.store(L3, Width::Q, 0x4000_0087).expect("in RAM");
        let page = walk(&cpu, &mem, 0x1234_5678, Access::Read, By::User).expect("mapped");
        assert_eq!((page.gpa, page.size), (0x5234_5000, 1 << 30));
        // PS in a level-4 entry is reserved.
        mem.store(ROOT, Width::Q, L3 | 0x87).expect("in RAM");
        assert_eq!(gpa(&cpu, &mem, Access::Read, By::User), pf(13));
    }

    #[test]
    fn reserved_bits_of_pdptes() {
        let mem = GuestMemory::Ram(Ram::new(1 << 20).expect("1 MiB"));
        let mut cpu = CpuState::reset();
        cpu.efer |= Efer::NXE;
        // SDM 3A table 4-8: bits 2:1, 8:5 and 63:MAXPHYADDR; only of present entries.
        for (entry, bad) in [
            (0x2001, false),
            (0x2e19, false),
            (0x2003, true),
            (0x2021, true),
            (0x2101, true),
            (XD | 0x2001, true),
            (1 << 52 | 0x2001, true),
            (0x21e6, false),
        ] {
            mem.store(0x1058, Width::Q, entry).expect("in RAM");
            assert_eq!(bad_pdpte(&cpu, &mem, 0x1040), bad, "{entry:#x}");
        }
    }

    #[test]
    fn thirty_two_bit_and_pae() {
        let mem = GuestMemory::Ram(Ram::new(1 << 20).expect("1 MiB"));
        let mut cpu = CpuState::reset();
        cpu.cr0 |= Cr0::PE | Cr0::PG | Cr0::WP;
        cpu.cr3 = ROOT;
        // Linear 0x00c05123: directory entry 3, table entry 5.
        mem.store(ROOT + 12, Width::D, L1 | 7).expect("in RAM");
        mem.store(L1 + 20, Width::D, 0x9005).expect("in RAM");
        let at = 0x00c0_5123;
        assert_eq!(walk(&cpu, &mem, at, Access::Read, By::User).map(|p| p.gpa), Ok(0x9000));
        assert_eq!(walk(&cpu, &mem, at, Access::Write, By::User), Err(Fault::Pf { addr: at, code: 7 }));
        assert_eq!(mem.load(L1 + 20, Width::D), Some(0x9025));
        cpu.cr4 |= Cr4::PSE;
        mem.store(ROOT + 12, Width::D, 0x0080_0087).expect("in RAM");
        let page = walk(&cpu, &mem, at, Access::Write, By::User).expect("mapped");
        assert_eq!((page.gpa, page.size), (0x0080_5000, 4 << 20));

        cpu.cr4 |= Cr4::PAE;
        cpu.cr3 = ROOT + 0x20;
        let at = 0xc020_5123; // PDPTE 3, PDE 1, PTE 5
        mem.store(ROOT + 0x20 + 24, Width::Q, L2 | 1).expect("in RAM");
        mem.store(L2 + 8, Width::Q, L1 | 7).expect("in RAM");
        mem.store(L1 + 40, Width::Q, 0x9003).expect("in RAM");
        assert_eq!(walk(&cpu, &mem, at, Access::Write, By::Supervisor).map(|p| p.gpa), Ok(0x9000));
        assert_eq!(walk(&cpu, &mem, at, Access::Write, By::User), Err(Fault::Pf { addr: at, code: 7 }));
        assert_eq!(mem.load(ROOT + 0x20 + 24, Width::Q), Some(L2 | 1), "a PDPTE has no accessed flag");
    }
}
