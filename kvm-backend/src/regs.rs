//! [`CpuState`] to and from KVM's structures: general registers, system registers, MSRs, extended state, debug registers, events.
//!
//! Everything here is a plain translation; when it is done, and how often, is [`crate::run`]'s business, because each call into KVM
//! costs as much as an exit where KVM is software.

use bivisor_emulator::cpu::msr::index;
use bivisor_emulator::cpu::xsave::Layout;
use bivisor_emulator::cpu::{Attr, CpuState, Cr0, Cr4, Efer, Rflags, Segment, Table, XsaveArea};
use bivisor_emulator::isa::{Gpr, Seg};
use kvm_bindings::{
    KVM_VCPUEVENT_VALID_SHADOW, Msrs, kvm_debugregs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
    kvm_vcpu_events, kvm_xcr, kvm_xcrs, kvm_xsave,
};

/// General registers into KVM's form.
pub fn regs(cpu: &CpuState) -> kvm_regs {
    let g = |r: Gpr| cpu.gpr[r as usize];
    kvm_regs {
        rax: g(Gpr::Rax),
        rbx: g(Gpr::Rbx),
        rcx: g(Gpr::Rcx),
        rdx: g(Gpr::Rdx),
        rsi: g(Gpr::Rsi),
        rdi: g(Gpr::Rdi),
        rsp: g(Gpr::Rsp),
        rbp: g(Gpr::Rbp),
        r8: g(Gpr::R8),
        r9: g(Gpr::R9),
        r10: g(Gpr::R10),
        r11: g(Gpr::R11),
        r12: g(Gpr::R12),
        r13: g(Gpr::R13),
        r14: g(Gpr::R14),
        r15: g(Gpr::R15),
        rip: cpu.rip,
        rflags: cpu.rflags.bits(),
    }
}

/// General registers from KVM's form.
pub fn take_regs(cpu: &mut CpuState, r: &kvm_regs) {
    cpu.gpr =
        [r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15];
    cpu.rip = r.rip;
    cpu.rflags = Rflags::from_bits_retain(r.rflags) | Rflags::FIXED;
}

/// A segment register into KVM's form.
pub fn segment(s: &Segment) -> kvm_segment {
    let bit = |a: Attr| u8::from(s.attr.contains(a));
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.attr.kind(),
        present: bit(Attr::P),
        dpl: s.attr.dpl(),
        db: bit(Attr::DB),
        s: bit(Attr::S),
        l: bit(Attr::L),
        g: bit(Attr::G),
        avl: bit(Attr::AVL),
        unusable: bit(Attr::UNUSABLE) | u8::from(!s.attr.contains(Attr::P)),
        padding: 0,
    }
}

/// A segment register from KVM's form.
pub fn take_segment(s: &kvm_segment) -> Segment {
    let attr = u32::from(s.type_ & 0xf)
        | u32::from(s.s & 1) << 4
        | u32::from(s.dpl & 3) << 5
        | u32::from(s.present & 1) << 7
        | u32::from(s.avl & 1) << 12
        | u32::from(s.l & 1) << 13
        | u32::from(s.db & 1) << 14
        | u32::from(s.g & 1) << 15;
    if s.unusable != 0 {
        // The hidden part of an unusable register means nothing, but its base can be read back (FS and GS).
        return Segment { base: s.base, ..Segment::unusable(s.selector) };
    }
    Segment { base: s.base, limit: s.limit, attr: Attr::from_bits_retain(attr), selector: s.selector }
}

fn table(t: &Table) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, padding: [0; 3] }
}

/// System registers into KVM's form; what [`CpuState`] does not hold is kept from `old`.
pub fn sregs(cpu: &CpuState, old: &kvm_sregs) -> kvm_sregs {
    let s = |x: Seg| segment(cpu.segment(x));
    kvm_sregs {
        cs: s(Seg::Cs),
        ds: s(Seg::Ds),
        es: s(Seg::Es),
        fs: s(Seg::Fs),
        gs: s(Seg::Gs),
        ss: s(Seg::Ss),
        tr: segment(&cpu.tr),
        ldt: segment(&cpu.ldtr),
        gdt: table(&cpu.gdtr),
        idt: table(&cpu.idtr),
        cr0: cpu.cr0.bits(),
        cr2: cpu.cr2,
        cr3: cpu.cr3,
        cr4: cpu.cr4.bits(),
        cr8: cpu.cr8,
        efer: cpu.efer.bits(),
        apic_base: cpu.msr.apic_base,
        interrupt_bitmap: old.interrupt_bitmap,
    }
}

/// System registers from KVM's form.
pub fn take_sregs(cpu: &mut CpuState, s: &kvm_sregs) {
    take_segments(cpu, s);
    cpu.tr = take_segment(&s.tr);
    cpu.ldtr = take_segment(&s.ldt);
    cpu.gdtr = Table { base: s.gdt.base, limit: s.gdt.limit };
    cpu.idtr = Table { base: s.idt.base, limit: s.idt.limit };
    cpu.cr0 = Cr0::from_bits_retain(s.cr0);
    cpu.cr2 = s.cr2;
    cpu.cr3 = s.cr3;
    cpu.cr4 = Cr4::from_bits_retain(s.cr4);
    cpu.cr8 = s.cr8;
    cpu.efer = Efer::from_bits_retain(s.efer);
    cpu.msr.apic_base = s.apic_base;
}

/// The six segment registers from KVM's form.
pub fn take_segments(cpu: &mut CpuState, s: &kvm_sregs) {
    cpu.seg = [&s.es, &s.cs, &s.ss, &s.ds, &s.fs, &s.gs].map(take_segment);
}

/// The MSRs that [`CpuState`] holds and KVM keeps.
const MSRS: [u32; 10] = [
    index::STAR,
    index::LSTAR,
    index::CSTAR,
    index::FMASK,
    index::KERNEL_GS_BASE,
    index::SYSENTER_CS,
    index::SYSENTER_ESP,
    index::SYSENTER_EIP,
    index::PAT,
    // Last: KVM stops at the first that it does not offer.
    index::TSC_AUX,
];

fn msr_field(cpu: &mut CpuState, index: u32) -> Option<&mut u64> {
    let m = &mut cpu.msr;
    Some(match index {
        index::STAR => &mut m.star,
        index::LSTAR => &mut m.lstar,
        index::CSTAR => &mut m.cstar,
        index::FMASK => &mut m.fmask,
        index::KERNEL_GS_BASE => &mut m.kernel_gs_base,
        index::SYSENTER_CS => &mut m.sysenter_cs,
        index::SYSENTER_ESP => &mut m.sysenter_esp,
        index::SYSENTER_EIP => &mut m.sysenter_eip,
        index::TSC_AUX => &mut m.tsc_aux,
        index::PAT => &mut m.pat,
        _ => return None,
    })
}

/// The MSRs into KVM's form.
pub fn msrs(cpu: &CpuState) -> Msrs {
    let mut copy = CpuState { msr: cpu.msr, ..CpuState::reset() };
    let entries =
        MSRS.map(|index| kvm_msr_entry { index, reserved: 0, data: msr_field(&mut copy, index).map_or(0, |v| *v) });
    Msrs::from_entries(&entries).expect("ten entries fit")
}

/// The list of MSRs to ask for, without values.
pub fn msr_list() -> Msrs {
    let entries = MSRS.map(|index| kvm_msr_entry { index, reserved: 0, data: 0 });
    Msrs::from_entries(&entries).expect("ten entries fit")
}

/// The first `n` MSRs from KVM's form.
pub fn take_msrs(cpu: &mut CpuState, msrs: &Msrs, n: usize) {
    for entry in msrs.as_slice().iter().take(n) {
        if let Some(v) = msr_field(cpu, entry.index) {
            *v = entry.data;
        }
    }
}

/// The extended state into KVM's form.
pub fn xsave(area: &XsaveArea) -> Box<kvm_xsave> {
    let mut x = Box::<kvm_xsave>::default();
    for (word, bytes) in x.region.iter_mut().zip(area.bytes.chunks_exact(4)) {
        *word = u32::from_le_bytes(bytes.try_into().expect("chunks of four"));
    }
    x
}

/// The extended state from KVM's form; components that [`XsaveArea`] does not hold are left out.
pub fn take_xsave(area: &mut XsaveArea, x: &kvm_xsave) {
    for (word, bytes) in x.region.iter().zip(area.bytes.chunks_exact_mut(4)) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    area.set_xstate_bv(area.xstate_bv() & Layout::host().components);
}

/// XCR0 into KVM's form.
pub fn xcrs(cpu: &CpuState) -> kvm_xcrs {
    let mut x = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    x.xcrs[0] = kvm_xcr { xcr: 0, reserved: 0, value: cpu.xcr0 };
    x
}

/// XCR0 from KVM's form.
pub fn take_xcrs(cpu: &mut CpuState, x: &kvm_xcrs) {
    if let Some(x) = x.xcrs.iter().take(x.nr_xcrs as usize).find(|x| x.xcr == 0) {
        cpu.xcr0 = x.value;
    }
}

/// Debug registers into KVM's form.
pub fn debug_regs(cpu: &CpuState) -> kvm_debugregs {
    kvm_debugregs { db: cpu.dr, dr6: cpu.dr6, dr7: cpu.dr7, ..Default::default() }
}

/// Debug registers from KVM's form.
pub fn take_debug_regs(cpu: &mut CpuState, d: &kvm_debugregs) {
    cpu.dr = d.db;
    cpu.dr6 = d.dr6;
    cpu.dr7 = d.dr7;
}

/// Interrupt shadow and NMI blocking into KVM's form; nothing is pending between runs.
pub fn events(cpu: &CpuState) -> kvm_vcpu_events {
    let mut e = kvm_vcpu_events { flags: KVM_VCPUEVENT_VALID_SHADOW, ..Default::default() };
    // KVM_X86_SHADOW_INT_STI: holds interrupts for one instruction. MOV SS's shadow holds debug traps as well.
    e.interrupt.shadow = if cpu.interrupt_shadow { 2 } else { 0 };
    e.nmi.masked = u8::from(cpu.nmi_blocked);
    e
}

/// Interrupt shadow and NMI blocking from KVM's form.
pub fn take_events(cpu: &mut CpuState, e: &kvm_vcpu_events) {
    cpu.interrupt_shadow = e.interrupt.shadow != 0;
    cpu.nmi_blocked = e.nmi.masked != 0;
}
