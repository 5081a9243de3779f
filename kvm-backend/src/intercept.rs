//! How a process's vCPU is made to leave at what the engine was told to stop at: descriptor tables and stubs above the guest.
//!
//! - SYSCALL: LSTAR points to a stub that stores to [`HOLE`], a page without memory: KVM_EXIT_MMIO. In hardware the stub runs at
//!   CPL 0; a software KVM leaves it at CPL 3, so the stub's page and the hole are user-accessible.
//! - Exceptions: each gate of the IDT leads to a stub at CPL 0 that writes to [`PORT`]: KVM_EXIT_IO. The vector is in RIP, the guest's
//!   state in the frame on the vCPU's own stack (SDM 3A 6.14). INT3 and INT 4 have gates of their own (DPL 3); any other INT n is
//!   #GP with the vector in its error code, or #UD under a software KVM, and is decoded.
//!
//! Nothing of it runs except on the way out; the way back in is made by setting the registers.

use bivisor_emulator::cpu::{Attr, Segment, Table};

/// Start of the processor's own pages: in the upper half, where no Linux program has anything.
pub const KERNEL: u64 = 0xffff_ff80_0000_0000;
const GDT: u64 = KERNEL;
const IDT: u64 = KERNEL + 0x1000;
/// Stub of vector 0; the others follow, 16 bytes each.
pub const STUBS: u64 = KERNEL + 0x2000;
/// Where SYSCALL goes.
pub const LSTAR: u64 = KERNEL + 0x3000;
/// A page that leaves the guest when it is stored to.
pub const HOLE: u64 = KERNEL + 0x4000;
/// Where [`HOLE`] leads: guest-physical memory that is never given out.
pub const HOLE_GPA: u64 = 0x1000;
/// Pages of the vCPUs.
const OWN: u64 = KERNEL + 0x10_0000;
/// The port that the stubs of the IDT write to.
pub const PORT: u16 = 0x10;

/// IA32_STAR: SYSCALL loads CS 0x10 and SS 0x18, SYSRET CS 0x33 and SS 0x2b: Linux's numbers.
pub const STAR: u64 = 0x0023_0010_0000_0000;
/// IA32_FMASK as Linux sets it: IF, TF, DF, AC, NT, IOPL are cleared.
pub const FMASK: u64 = 0x47700;

/// A page of the processor.
pub struct TablePage {
    /// Linear address.
    pub address: u64,
    /// Contents from its start.
    pub bytes: Vec<u8>,
    /// Accessible at CPL 3.
    pub user: bool,
}

/// The pages that all vCPUs share.
pub fn tables() -> [TablePage; 4] {
    // Null, null, 64-bit code and data at DPL 0; 32-bit code, data and 64-bit code at DPL 3, as Linux has them.
    let gdt: [u64; 7] = [
        0,
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
    ];
    let mut idt = Vec::new();
    let mut stubs = Vec::new();
    for vector in 0..256u64 {
        let stub = STUBS + 16 * vector;
        // A 64-bit interrupt gate, present, to selector 0x10 (SDM 3A figure 6-8).
        let dpl = if matches!(vector, 3 | 4) { 3 } else { 0 };
        let low = stub & 0xffff | 0x10 << 16 | (0x8e00 | dpl << 13) << 32 | (stub >> 16 & 0xffff) << 48;
        idt.extend(low.to_le_bytes());
        idt.extend((stub >> 32).to_le_bytes());
        // out PORT, al; hlt
        stubs.extend([0xe6, PORT as u8, 0xf4]);
        stubs.resize(16 * (vector as usize + 1), 0xcc);
    }
    // mov [HOLE], al; jmp to itself: the monitor moves RIP.
    let mut lstar = vec![0xa2];
    lstar.extend(HOLE.to_le_bytes());
    lstar.extend([0xeb, 0xf5]);
    let page = |address, bytes, user| TablePage { address, bytes, user };
    [
        page(GDT, gdt.iter().flat_map(|d| d.to_le_bytes()).collect(), false),
        page(IDT, idt, false),
        page(STUBS, stubs, false),
        page(LSTAR, lstar, true),
    ]
}

/// The page of a vCPU: its TSS at the start, the stack of the stubs at the end.
pub fn own_page(id: u64) -> u64 {
    OWN + 0x1000 * id
}

fn stack(id: u64) -> u64 {
    own_page(id) + 0xff0
}

/// Contents of [`own_page`]: RSP0 at offset 4 of the TSS, no I/O permission map.
pub fn own_page_bytes(id: u64) -> Vec<u8> {
    let mut tss = vec![0; 0x68];
    tss[4..12].copy_from_slice(&stack(id).to_le_bytes());
    tss[0x66..0x68].copy_from_slice(&0x68u16.to_le_bytes());
    tss
}

/// GDTR.
pub fn gdtr() -> Table {
    Table { base: GDT, limit: 7 * 8 - 1 }
}

/// IDTR.
pub fn idtr() -> Table {
    Table { base: IDT, limit: 0xfff }
}

/// TR: the TSS of a vCPU, loaded without a descriptor.
pub fn tr(id: u64) -> Segment {
    Segment { base: own_page(id), limit: 0x67, attr: Attr::from_bits_retain(0x8b), selector: 0x40 }
}

/// The vector whose stub RIP is in.
pub fn vector_of(rip: u64) -> Option<u8> {
    (STUBS..STUBS + 4096).contains(&rip).then(|| (rip.wrapping_sub(STUBS) / 16) as u8)
}

/// Do hardware and this vector push an error code (SDM 3A table 6-1)?
pub fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
}
