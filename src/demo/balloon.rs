//! `bivisor demo balloon`: a guest's driver fills a virtio balloon (Virtual I/O Device 1.2, 5.5), and the host has the memory back.

use super::{Count, Report, Step};
use crate::engine::{self, Backend, Purpose};
use crate::guest;
use anyhow::{Context, Result, anyhow, bail};
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::devices::virtio::balloon::{Balloon, Target};
use bivisor_emulator::machine::{Config, End, Machine, Sink, boot};
use bivisor_emulator::mem::{GuestMemory, PAGE_SIZE};
use bivisor_emulator::vcpu::Vcpu;
use iced_x86::code_asm::*;
use std::any::Any;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// RAM, and the part of it that the guest works with.
const RAM: u64 = 64 * MIB;
const WORK: u64 = 16 * MIB;
const WORK_SIZE: u64 = 32 * MIB;
/// What the host asks for, and what the guest takes back.
const ASKED: u64 = 24 * MIB;
const TAKEN: u64 = 4 * MIB;

const CODE: u64 = 0x10_0000;
const STACK: u64 = 0x9_0000;
/// Descriptors, available ring and used ring of a queue, a page each; then the other queue's.
const QUEUES: u64 = 0x20_0000;
const QUEUE: u64 = 0x3000;
/// Page numbers, 32 bits each, as many as Linux gives at a time.
const NUMBERS: u64 = 0x21_0000;
const AT_ONCE: u64 = 256;
/// Where the guest keeps the notification registers' addresses.
const NOTIFY: u64 = 0x21_1000;

/// The debug console, on which the guest says how far it is, a letter and an end of line.
const CONSOLE: u16 = 0xe9;
/// Device 1045h of vendor 1AF4h: the balloon, modern interface.
const BALLOON: u32 = 0x1045_1af4;

/// What the guest does, by the letter that it says; how the host sees it, and the value that must be seen.
const STEPS: [(u8, &str, Look, u64); 6] = [
    (b'a', "before any use; the host gives, MiB", Look::Resident, 0),
    (b'b', "32 MiB written; the host gives, MiB", Look::Resident, 32),
    (b'c', "24 MiB asked for; given up, MiB", Look::Given, 24),
    (b'c', "the host gives, MiB", Look::Resident, 8),
    (b'd', "4 MiB taken back, zeros; given up, MiB", Look::Given, 20),
    (b'e', "these written; the host gives, MiB", Look::Resident, 12),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// Pages of the guest's memory that the host keeps.
    Resident,
    /// Pages that the guest says it has given up.
    Given,
}

/// Sends `n` pages of the working memory, from number R13D on, to a queue, [`AT_ONCE`] at a time. RBX: the queue's memory, RBP: where it is
/// notified.
fn give(a: &mut CodeAssembler, queue: u64, n: u64) -> Result<()> {
    let (mut chunk, mut number, mut wait) = (a.create_label(), a.create_label(), a.create_label());
    let at = QUEUES + queue * QUEUE;
    a.mov(rbp, qword_ptr(NOTIFY + 8 * queue))?;
    a.mov(rbx, at)?;
    a.mov(rax, NUMBERS)?;
    a.mov(qword_ptr(rbx), rax)?;
    a.mov(qword_ptr(rbx + 8), (AT_ONCE * 4) as i32)?;
    a.mov(r14d, (n / AT_ONCE) as i32)?;
    a.set_label(&mut chunk)?;
    a.mov(rdi, NUMBERS)?;
    a.mov(ecx, AT_ONCE as i32)?;
    a.set_label(&mut number)?;
    a.mov(eax, r13d)?;
    a.stosd()?;
    a.inc(r13d)?;
    a.dec(ecx)?;
    a.jnz(number)?;
    // Descriptor 0 again and again: the ring's entries are zero as they are.
    a.inc(word_ptr(rbx + 0x1002))?;
    a.mov(word_ptr(rbp), queue as i32)?;
    a.movzx(eax, word_ptr(rbx + 0x1002))?;
    a.set_label(&mut wait)?;
    a.pause()?;
    a.cmp(word_ptr(rbx + 0x2002), ax)?;
    a.jne(wait)?;
    a.dec(r14d)?;
    a.jnz(chunk)?;
    Ok(())
}

fn say(a: &mut CodeAssembler, letter: u8) -> Result<()> {
    a.mov(edx, i32::from(CONSOLE))?;
    for byte in [letter, b'\n'] {
        a.mov(al, i32::from(byte))?;
        a.out(dx, al)?;
    }
    Ok(())
}

/// Writes the pages from RDI on, ECX of them.
fn write_pages(a: &mut CodeAssembler) -> Result<()> {
    let mut next = a.create_label();
    a.set_label(&mut next)?;
    a.mov(qword_ptr(rdi), rdi)?;
    a.add(rdi, PAGE_SIZE as i32)?;
    a.dec(ecx)?;
    a.jnz(next)?;
    Ok(())
}

/// Finds the balloon on PCI and its structures: R8 common configuration, R9 notification, R10 its multiplier, R11 device configuration.
fn find(a: &mut CodeAssembler, lost: CodeLabel) -> Result<()> {
    let (mut read, mut over) = (a.create_label(), a.create_label());
    a.jmp(over)?;
    // EAX: the double word at ESI of the function EBX.
    a.set_label(&mut read)?;
    a.lea(eax, ptr(rbx + rsi))?;
    a.mov(edx, 0xcf8)?;
    a.out(dx, eax)?;
    a.mov(edx, 0xcfc)?;
    a.in_(eax, dx)?;
    a.ret()?;
    a.set_label(&mut over)?;
    let (mut device, mut found) = (a.create_label(), a.create_label());
    a.mov(ebx, 0x8000_0000u32)?;
    a.set_label(&mut device)?;
    a.xor(esi, esi)?;
    a.call(read)?;
    a.cmp(eax, BALLOON as i32)?;
    a.je(found)?;
    a.add(ebx, 0x800)?;
    a.cmp(ebx, 0x8001_0000u32 as i32)?;
    a.jb(device)?;
    a.jmp(lost)?;
    a.set_label(&mut found)?;
    // Command: memory space, bus master.
    a.mov(esi, 4)?;
    a.call(read)?;
    a.mov(eax, 6)?;
    a.out(dx, eax)?;
    a.mov(esi, 0x10)?;
    a.call(read)?;
    a.and(eax, !0xf)?;
    a.mov(r12d, eax)?;
    // The vendor's capabilities: where in base address 0 each structure is (4.1.4).
    let (mut capability, mut next, mut done) = (a.create_label(), a.create_label(), a.create_label());
    a.mov(esi, 0x34)?;
    a.call(read)?;
    a.movzx(edi, al)?;
    a.set_label(&mut capability)?;
    a.test(edi, edi)?;
    a.jz(done)?;
    a.mov(esi, edi)?;
    a.call(read)?;
    a.mov(ebp, eax)?;
    a.cmp(al, 9)?;
    a.jne(next)?;
    a.lea(esi, ptr(rdi + 8))?;
    a.call(read)?;
    a.add(rax, r12)?;
    a.mov(ecx, ebp)?;
    a.shr(ecx, 24)?;
    a.cmp(ecx, 1)?;
    a.cmove(r8, rax)?;
    a.cmp(ecx, 4)?;
    a.cmove(r11, rax)?;
    a.cmp(ecx, 2)?;
    a.jne(next)?;
    a.mov(r9, rax)?;
    a.lea(esi, ptr(rdi + 16))?;
    a.call(read)?;
    a.mov(r10d, eax)?;
    a.set_label(&mut next)?;
    a.shr(ebp, 8)?;
    a.movzx(edi, bpl)?;
    a.jmp(capability)?;
    a.set_label(&mut done)?;
    Ok(())
}

/// Brings the device to life (3.1.1): reset, acknowledge, driver, VERSION_1 and nothing else, its queues, ready.
fn start(a: &mut CodeAssembler) -> Result<()> {
    for status in [0, 1, 3] {
        a.mov(byte_ptr(r8 + 0x14), status)?;
    }
    for (word, value) in [(0x08, 0), (0x0c, 0), (0x08, 1), (0x0c, 1)] {
        a.mov(dword_ptr(r8 + word), value)?;
    }
    a.mov(byte_ptr(r8 + 0x14), 0xb)?;
    for queue in 0..2 {
        a.mov(word_ptr(r8 + 0x16), queue as i32)?;
        for (n, register) in [0x20, 0x28, 0x30].into_iter().enumerate() {
            a.mov(dword_ptr(r8 + register), (QUEUES + queue * QUEUE + n as u64 * 0x1000) as i32)?;
            a.mov(dword_ptr(r8 + register + 4), 0)?;
        }
        a.mov(word_ptr(r8 + 0x1c), 1)?;
        a.movzx(eax, word_ptr(r8 + 0x1e))?;
        a.imul_2(eax, r10d)?;
        a.add(rax, r9)?;
        a.mov(qword_ptr(NOTIFY + 8 * queue), rax)?;
    }
    a.mov(byte_ptr(r8 + 0x14), 0xf)?;
    Ok(())
}

/// The guest: a kernel that is nothing but the driver.
fn image() -> Result<Vec<u8>> {
    let mut a = CodeAssembler::new(64)?;
    let a = &mut a;
    let (mut lost, mut off, mut asked, mut zeros) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label());
    a.mov(esp, STACK as i32)?;
    a.cld()?;
    find(a, lost)?;
    start(a)?;
    say(a, b'a')?;
    a.mov(rdi, WORK)?;
    a.mov(ecx, (WORK_SIZE / PAGE_SIZE) as i32)?;
    write_pages(a)?;
    say(a, b'b')?;
    // How many pages the host wants is in the device's configuration.
    a.set_label(&mut asked)?;
    a.pause()?;
    a.cmp(dword_ptr(r11), (ASKED / PAGE_SIZE) as i32)?;
    a.jne(asked)?;
    a.mov(r13d, (WORK / PAGE_SIZE) as i32)?;
    give(a, 0, ASKED / PAGE_SIZE)?;
    a.mov(dword_ptr(r11 + 4), (ASKED / PAGE_SIZE) as i32)?;
    say(a, b'c')?;
    a.mov(r13d, (WORK / PAGE_SIZE) as i32)?;
    give(a, 1, TAKEN / PAGE_SIZE)?;
    a.mov(dword_ptr(r11 + 4), ((ASKED - TAKEN) / PAGE_SIZE) as i32)?;
    // They come back as zeros, whatever was in them.
    a.mov(rdi, WORK)?;
    a.mov(ecx, (TAKEN / PAGE_SIZE) as i32)?;
    a.set_label(&mut zeros)?;
    a.cmp(qword_ptr(rdi), 0)?;
    a.jne(lost)?;
    a.add(rdi, PAGE_SIZE as i32)?;
    a.dec(ecx)?;
    a.jnz(zeros)?;
    say(a, b'd')?;
    a.mov(rdi, WORK)?;
    a.mov(ecx, (TAKEN / PAGE_SIZE) as i32)?;
    write_pages(a)?;
    say(a, b'e')?;
    a.jmp(off)?;
    a.set_label(&mut lost)?;
    say(a, b'!')?;
    // S5 by the PM1 control register.
    a.set_label(&mut off)?;
    a.mov(edx, 0x604)?;
    a.mov(eax, 0x3400)?;
    a.out(dx, ax)?;
    a.hlt()?;
    Ok(a.assemble(CODE)?)
}

/// Bytes of the working memory that the host has given pages for (proc_pid_pagemap(5): bit 63 present, bit 62 swapped).
fn resident(mem: &GuestMemory) -> Result<u64> {
    let base = mem.ram().context("RAM")?.host_base() as u64 + WORK;
    let mut file = File::open("/proc/self/pagemap").context("/proc/self/pagemap")?;
    file.seek(SeekFrom::Start(base / PAGE_SIZE * 8))?;
    let mut entries = vec![0; (WORK_SIZE / PAGE_SIZE * 8) as usize];
    file.read_exact(&mut entries).context("/proc/self/pagemap")?;
    // The sign of an entry's last byte, and the bit below it.
    Ok(entries.chunks_exact(8).filter(|e| e[7] & 0xc0 != 0).count() as u64 * PAGE_SIZE)
}

/// What the host sees whenever the guest says something.
struct Watch {
    mem: OnceLock<Arc<GuestMemory>>,
    target: Arc<Target>,
    seen: Mutex<BTreeMap<usize, Result<u64>>>,
}

/// The console's far end.
struct Ear(Arc<Watch>);

impl Write for Ear {
    fn write(&mut self, said: &[u8]) -> std::io::Result<usize> {
        let mut seen = self.0.seen.lock().unwrap_or_else(PoisonError::into_inner);
        for letter in said {
            for (n, (_, _, look, _)) in STEPS.iter().enumerate().filter(|(_, s)| s.0 == *letter) {
                let value = match (look, self.0.mem.get()) {
                    (Look::Given, _) => Ok(u64::from(self.0.target.given.load(Ordering::Relaxed)) * PAGE_SIZE),
                    (Look::Resident, Some(mem)) => resident(mem),
                    (Look::Resident, None) => continue,
                };
                seen.insert(n, value);
            }
            if *letter == b'b' {
                self.0.target.pages.store((ASKED / PAGE_SIZE) as u32, Ordering::Relaxed);
            }
        }
        Ok(said.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Runs the guest on an engine: what was seen at each step, in MiB, and why the guest was left.
fn watch(backend: Backend) -> Result<(BTreeMap<usize, u32>, Vec<Count>)> {
    let (backend, _) = engine::choose(backend, Purpose::Machine).map_err(|why| anyhow!(why))?;
    let vcpu =
        engine::for_machine(backend, Arc::new(CpuModel::host()), false, Some(false)).map_err(|why| anyhow!(why))?;
    let target = Arc::new(Target::default());
    let watch = Arc::new(Watch { mem: OnceLock::new(), target: target.clone(), seen: Mutex::default() });
    let config = Config {
        counted_time: false,
        debugcon: vec![(CONSOLE, Sink::new(Box::new(Ear(watch.clone()))))],
        virtio: vec![Box::new(Balloon::new(target))],
        ..Config::bare(RAM)
    };
    let mut machine = Machine::new(vcpu, config).map_err(|why| anyhow!(why))?;
    machine.leave_firmware();
    // There is one machine, so nobody was first.
    let _ = watch.mem.set(machine.shared_memory());
    let (mem, cpu) = machine.guest();
    boot::start_long(mem, cpu, &image()?, CODE).map_err(|why| anyhow!(why))?;
    match machine.run(Some(Duration::from_secs(20))) {
        End::PowerOff => {}
        end => bail!("the guest ended otherwise: {end:?}"),
    }
    let vcpu: &mut (dyn Vcpu + 'static) = machine.vcpu();
    let any: &dyn Any = vcpu;
    let ledger = guest::ledger(any).into_iter().map(|((reason, name), n)| (reason, name, n)).collect();
    let seen = std::mem::take(&mut *watch.seen.lock().unwrap_or_else(PoisonError::into_inner));
    let seen = seen.into_iter().map(|(n, value)| Ok((n, (value? / MIB) as u32))).collect::<Result<_>>()?;
    Ok((seen, ledger))
}

/// The demonstration on each engine.
pub fn show() -> Report {
    let mut report = Report {
        demo: "balloon".into(),
        steps: STEPS
            .iter()
            .map(|(_, code, _, expected)| Step { code, expected: *expected as u32, seen: BTreeMap::new() })
            .collect(),
        failed: BTreeMap::new(),
        ledger: BTreeMap::new(),
        wrong_under_trap: None,
        moral: "A guest's kernel never tells the host which of its pages are free: without a balloon all that it once touched stays \
                taken. Its driver allocates pages and names them to the host, which takes their memory away. This is cooperation and \
                not protection: a guest that touches such a page has memory again, filled with zeros.",
        kvm: bivisor_kvm_backend::host().reason.clone(),
    };
    report.failed.insert("trap", "its guests have no devices".into());
    for (name, backend) in [("interp", Backend::Interp), ("bt", Backend::Bt), ("kvm", Backend::Kvm)] {
        match watch(backend) {
            Ok((seen, ledger)) => {
                for (n, step) in report.steps.iter_mut().enumerate() {
                    step.seen.insert(name, seen.get(&n).copied());
                }
                report.ledger.insert(name, ledger);
            }
            Err(why) => {
                report.failed.insert(name, format!("{why:#}"));
            }
        }
    }
    report
}
