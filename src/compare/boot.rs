//! Machines that boot: a small kernel of our own, assembled here, and one that the user names.
//!
//! Ours begins in 64-bit mode and does what kernels do: it asks CPUID and MSRs, builds page tables, programs the 8259 and the 8254 and waits
//! for a tick, looks for PCI devices, pages memory in on demand in several address spaces, writes to the serial port, and turns the
//! machine off by ACPI.

use super::program::wait;
use anyhow::{Result, bail};
use iced_x86::code_asm::*;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// A machine to boot.
pub struct Machine {
    /// Its name.
    pub name: &'static str,
    /// What boots.
    pub what: &'static str,
    /// What decides.
    pub why: &'static str,
    arguments: Vec<String>,
    /// A file of ours, gone when this is.
    file: Option<PathBuf>,
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(file) = &self.file {
            // Nobody can do anything about it.
            let _ = std::fs::remove_file(file);
        }
    }
}

/// The name of the row of the user's kernel.
pub const KERNEL: &str = "kernel";
/// The name of the row of ours.
pub const SMALL: &str = "small boot";
/// Where they run.
pub const ENGINES: [&str; 3] = ["interp", "bt", "kvm"];

const BASE: u64 = 0x10_0000;
const TABLES: u64 = 0x20_0000;
const IDT: u64 = 0x1f_0000;
const STACK: u64 = 0x1e_0000;
/// Where memory is paged in on demand, in pages of 2 MiB: the second GiB.
const DEMAND: u64 = 0x4000_0000;
const SPACES: i32 = 64;
const COM1: i32 = 0x3f8;

/// A gate at RDI for the handler at RAX, in the code segment that is in use.
fn gate(a: &mut CodeAssembler, vector: u64, handler: CodeLabel) -> Result<()> {
    a.lea(rax, ptr(handler))?;
    a.mov(rdi, IDT + 16 * vector)?;
    a.mov(word_ptr(rdi), ax)?;
    a.mov(word_ptr(rdi + 2), cs)?;
    a.mov(word_ptr(rdi + 4), 0x8e00)?;
    a.shr(rax, 16)?;
    a.mov(word_ptr(rdi + 6), ax)?;
    a.mov(qword_ptr(rdi + 8), 0)?;
    Ok(())
}

/// The kernel.
fn image() -> Result<Vec<u8>> {
    let mut a = CodeAssembler::new(64)?;
    let a = &mut a;
    let (mut fault, mut tick, mut again) = (a.create_label(), a.create_label(), a.create_label());
    a.mov(rsp, STACK)?;
    a.cld()?;
    // Who am I? Basic leaves, and some MSRs.
    a.xor(r15d, r15d)?;
    a.set_label(&mut again)?;
    a.mov(eax, r15d)?;
    a.xor(ecx, ecx)?;
    a.cpuid()?;
    a.mov(ecx, 0xc000_0080u32)?;
    a.rdmsr()?;
    a.inc(r15d)?;
    a.cmp(r15d, 512)?;
    a.jb(again)?;
    // Page tables: the first GiB mapped to itself, then a table with nothing in it, for each address space.
    let (mut space, mut page) = (a.create_label(), a.create_label());
    a.xor(r15d, r15d)?;
    a.set_label(&mut space)?;
    a.mov(ebx, r15d)?;
    a.shl(ebx, 14)?;
    a.add(ebx, TABLES as i32)?;
    a.mov(rdi, rbx)?;
    a.xor(eax, eax)?;
    a.mov(ecx, 2048)?;
    a.rep().stosq()?;
    for (at, to) in [(0, 0x1000), (0x1000, 0x2000), (0x1008, 0x3000)] {
        a.lea(rax, qword_ptr(rbx + to))?;
        a.or(rax, 7)?;
        a.mov(qword_ptr(rbx + at), rax)?;
    }
    a.mov(eax, 0x83)?;
    a.lea(rdi, qword_ptr(rbx + 0x2000))?;
    a.mov(ecx, 512)?;
    a.set_label(&mut page)?;
    a.stosq()?;
    a.add(rax, 0x20_0000)?;
    a.dec(ecx)?;
    a.jnz(page)?;
    a.inc(r15d)?;
    a.cmp(r15d, SPACES)?;
    a.jb(space)?;
    a.mov(rax, TABLES)?;
    a.mov(cr3, rax)?;
    // Interrupts: a fault pages in, a tick counts.
    gate(a, 14, fault)?;
    gate(a, 32, tick)?;
    a.push(0)?;
    a.mov(rax, IDT << 16 | 0xfff)?;
    a.push(rax)?;
    a.lidt(ptr(rsp))?;
    a.xor(r14d, r14d)?;
    for (port, value) in [
        (0x20, 0x11),
        (0x21, 32),
        (0x21, 4),
        (0x21, 1),
        (0x21, 0xfe),
        (0xa1, 0xff),
        (0x43, 0x34),
        (0x40, 0xa9),
        (0x40, 4),
    ] {
        a.mov(al, value)?;
        a.out(port, al)?;
    }
    let mut idle = a.create_label();
    a.set_label(&mut idle)?;
    a.sti()?;
    a.hlt()?;
    a.cli()?;
    a.test(r14d, r14d)?;
    a.jz(idle)?;
    a.mov(al, 0xff)?;
    a.out(0x21, al)?;
    // Which PCI devices are there? 256 functions of bus 0.
    let mut function = a.create_label();
    a.mov(r15d, 0x8000_0000u32)?;
    a.set_label(&mut function)?;
    a.mov(eax, r15d)?;
    a.mov(edx, 0xcf8)?;
    a.out(dx, eax)?;
    a.mov(edx, 0xcfc)?;
    a.in_(eax, dx)?;
    a.add(r15d, 0x100)?;
    a.cmp(r15d, 0x8001_0000u32 as i32)?;
    a.jb(function)?;
    // Address spaces: 64 pages touched in each, paged in by the fault's handler; a letter on the serial port for each.
    let (mut process, mut touch) = (a.create_label(), a.create_label());
    a.xor(r15d, r15d)?;
    a.set_label(&mut process)?;
    a.mov(eax, r15d)?;
    a.shl(eax, 14)?;
    a.add(eax, TABLES as i32)?;
    a.mov(cr3, rax)?;
    a.mov(rdi, DEMAND)?;
    a.mov(ecx, 64)?;
    a.set_label(&mut touch)?;
    a.mov(qword_ptr(rdi), rdi)?;
    a.add(rdi, 0x20_0000)?;
    a.dec(ecx)?;
    a.jnz(touch)?;
    a.mov(edx, COM1)?;
    a.mov(al, i32::from(b'.'))?;
    a.out(dx, al)?;
    a.inc(r15d)?;
    a.cmp(r15d, SPACES)?;
    a.jb(process)?;
    a.mov(edx, COM1)?;
    a.mov(al, i32::from(b'\n'))?;
    a.out(dx, al)?;
    // S5 by the PM1 control register.
    a.mov(edx, 0x604)?;
    a.mov(eax, 0x3400)?;
    a.out(dx, ax)?;
    let mut end = a.create_label();
    a.set_label(&mut end)?;
    a.hlt()?;
    a.jmp(end)?;
    // The page fault: the page is mapped to RAM at 16 MiB.
    a.set_label(&mut fault)?;
    a.push(rax)?;
    a.push(rbx)?;
    a.mov(rax, cr2)?;
    a.shr(rax, 21)?;
    a.and(eax, 0x1ff)?;
    a.mov(rbx, cr3)?;
    a.mov(qword_ptr(rbx + rax * 8 + 0x3000), 0x0100_0083)?;
    a.pop(rbx)?;
    a.pop(rax)?;
    a.add(rsp, 8)?;
    a.iretq()?;
    a.set_label(&mut tick)?;
    a.push(rax)?;
    a.inc(r14d)?;
    a.mov(al, 0x20)?;
    a.out(0x20, al)?;
    a.pop(rax)?;
    a.iretq()?;
    Ok(a.assemble(BASE)?)
}

/// Ours.
///
/// # Errors
/// No place for its file.
pub fn small() -> Result<Machine> {
    let file = std::env::temp_dir().join(format!("bivisor-compare-{}.bin", std::process::id()));
    std::fs::write(&file, image()?)?;
    let flat = format!("{}@{BASE:#x}", file.display());
    let arguments = ["--flat", &flat, "--mode", "long", "--memory", "64"].map(str::to_string).to_vec();
    Ok(Machine {
        name: SMALL,
        what: "a small kernel of our own, from 64-bit mode to ACPI's power-off",
        why: "sensitive instructions and page faults one after another: few of them are left to hardware where KVM is real, none to \
              the translator's guest",
        arguments,
        file: Some(file),
    })
}

/// The user's.
pub fn kernel(kernel: &Path, initrd: Option<&Path>, append: &str) -> Machine {
    let mut arguments = vec!["--kernel".to_string(), kernel.display().to_string(), "--append".into(), append.into()];
    if let Some(initrd) = initrd {
        arguments.extend(["--initrd".into(), initrd.display().to_string()]);
    }
    Machine {
        name: KERNEL,
        what: "the kernel that was named, until it turns the machine off or resets it",
        why: "a real kernel: mostly innocuous instructions in its own address space, then devices and page tables",
        arguments,
        file: None,
    }
}

/// Milliseconds of one run.
///
/// # Errors
/// It does not run there, or not to its end.
pub fn time(machine: &Machine, engine: &str, limit: Duration) -> Result<f64> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["boot", "--no-reboot", "--backend", engine]).args(&machine.arguments);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let (status, ms, said) = wait(command, limit)?;
    if !status.success() {
        bail!("{}", said.lines().next().map_or(format!("{status}"), str::to_string));
    }
    Ok(ms)
}
