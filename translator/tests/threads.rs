//! Several threads in one code cache: flushes while others are inside, forks while others translate.
#![allow(unsafe_code)]

use bivisor_emulator::bus::EmptyBus;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::cpu::{CpuState, Rflags};
use bivisor_emulator::isa::Gpr;
use bivisor_emulator::mem::{FlatSpace, GuestMemory, Prot, Vma};
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Vcpu};
use bivisor_translator::{Cache, Policy, Translator};
use iced_x86::code_asm::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const AREA: u64 = 64 << 10;
/// Blocks of a chain that does not fit into the small cache.
const LINKS: u64 = 2500;

fn map() -> u64 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a fresh mapping.
    let p =
        unsafe { libc::mmap(std::ptr::null_mut(), AREA as usize, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    assert_ne!(p, libc::MAP_FAILED);
    p as u64
}

fn word(at: u64) -> &'static AtomicU64 {
    // SAFETY: an aligned place in a mapping that is never taken away.
    unsafe { &*(at as *const AtomicU64) }
}

fn space(areas: &[u64]) -> GuestMemory {
    let space = FlatSpace::new();
    for &start in areas {
        let end = start + AREA;
        space.insert(Vma { start, end, prot: Prot::all(), shared: false, name: "".into(), offset: 0, backing: None });
    }
    GuestMemory::Flat(space)
}

fn put(at: u64, f: impl FnOnce(&mut CodeAssembler)) {
    let mut a = CodeAssembler::new(64).expect("64-bit");
    f(&mut a);
    let bytes = a.assemble(at).expect("assembles");
    assert!(bytes.len() as u64 <= AREA);
    // SAFETY: `at` is the start of an area.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) };
}

/// Adds one to RAX in each of many blocks, then SYSCALL.
fn chain(a: &mut CodeAssembler) {
    for _ in 0..LINKS {
        let mut next = a.create_label();
        a.inc(rax).unwrap();
        a.jmp(next).unwrap();
        a.set_label(&mut next).unwrap();
    }
    a.syscall().unwrap();
}

/// Counts in memory and in RAX until the next word is not zero, with calls and returns on the way.
fn spin(a: &mut CodeAssembler) {
    let mut top = a.create_label();
    let mut f = a.create_label();
    a.set_label(&mut top).unwrap();
    a.call(f).unwrap();
    a.mov(qword_ptr(rdi), rax).unwrap();
    a.cmp(qword_ptr(rdi + 8), 0).unwrap();
    a.je(top).unwrap();
    a.syscall().unwrap();
    a.set_label(&mut f).unwrap();
    a.inc(rax).unwrap();
    a.ret().unwrap();
}

fn cpu(cache: &Arc<Cache>, code: u64, stack: u64) -> Translator {
    bivisor_emulator::host::signal::attach();
    let mut t = Translator::with_cache(cache.clone());
    *t.state() = CpuState::long64(3);
    t.set_intercepts(Intercepts::SYSCALL | Intercepts::EXCEPTIONS);
    let s = t.state();
    s.rflags = Rflags::FIXED | Rflags::IF;
    s.gpr[Gpr::Rsp as usize] = stack + AREA - 256;
    s.rip = code;
    t
}

fn until_syscall(t: &mut Translator, mem: &GuestMemory) {
    match t.run(Board { mem, bus: &EmptyBus }, u64::MAX) {
        Exit::Intercept { what: Intercepts::SYSCALL, .. } => {}
        other => panic!("{other:?} at {:#x}", t.state().rip),
    }
}

fn small_cache() -> Arc<Cache> {
    Cache::new(Arc::new(CpuModel::host()), Policy::default(), 64 << 10).expect("executable memory")
}

#[test]
fn flushes_with_several_threads_inside() {
    const WALKS: u64 = 20;
    let cache = small_cache();
    let areas: Vec<u64> = (0..8).map(|_| map()).collect();
    let mem = space(&areas);
    // Two threads walk chains that make the cache flush all the time; two others never leave their loop of their own.
    let (chains, spins) = (&areas[..2], &areas[2..4]);
    chains.iter().for_each(|&at| put(at, chain));
    spins.iter().for_each(|&at| put(at, spin));
    let data = areas[6];
    std::thread::scope(|s| {
        for (i, &code) in spins.iter().enumerate() {
            let (cache, mem, stack) = (&cache, &mem, areas[4 + i]);
            s.spawn(move || {
                let counter = data + 16 * i as u64;
                let mut t = cpu(cache, code, stack);
                t.state().gpr[Gpr::Rdi as usize] = counter;
                until_syscall(&mut t, mem);
                assert_eq!(t.state().gpr[Gpr::Rax as usize], word(counter).load(Ordering::SeqCst));
                assert_eq!(t.state().gpr[Gpr::Rsp as usize], stack + AREA - 256);
            });
        }
        let walkers: Vec<_> = chains
            .iter()
            .map(|&code| {
                let (cache, mem, stack) = (&cache, &mem, areas[7]);
                s.spawn(move || {
                    let mut t = cpu(cache, code, stack);
                    for _ in 0..WALKS {
                        t.state().rip = code;
                        until_syscall(&mut t, mem);
                    }
                    assert_eq!(t.state().gpr[Gpr::Rax as usize], WALKS * LINKS);
                })
            })
            .collect();
        let outcome: Vec<_> = walkers.into_iter().map(|w| w.join()).collect();
        let moved: Vec<u64> = (0..2).map(|i| word(data + 16 * i).load(Ordering::SeqCst)).collect();
        (0..2).for_each(|i| word(data + 16 * i + 8).store(1, Ordering::SeqCst));
        assert!(outcome.iter().all(Result::is_ok));
        assert!(moved.iter().all(|&n| n > 0), "{moved:?}");
    });
    assert!(cache.stats().flushes > WALKS, "{:?}", cache.stats());
}

#[test]
fn forks_while_another_thread_translates() {
    let cache = small_cache();
    let areas: Vec<u64> = (0..4).map(|_| map()).collect();
    let mem = space(&areas);
    put(areas[0], chain);
    put(areas[1], chain);
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            let mut t = cpu(&cache, areas[0], areas[2]);
            while !stop.load(Ordering::Relaxed) {
                t.state().rip = areas[0];
                until_syscall(&mut t, &mem);
            }
        });
        let mut t = cpu(&cache, areas[1], areas[3]);
        until_syscall(&mut t, &mem);
        // Children in which the cache was taken over as it was, and in which it could not be.
        let mut seen = [0; 2];
        let begin = Instant::now();
        while (seen.contains(&0) || seen[0] + seen[1] < 50) && begin.elapsed() < Duration::from_secs(20) {
            // SAFETY: the child runs guest code, which may take memory (the C library's allocator can be used after fork), and exits.
            let child = unsafe {
                let guard = mem.flat().expect("flat").lock_for_fork();
                let child = libc::fork();
                drop(guard);
                child
            };
            assert!(child >= 0);
            if child == 0 {
                t.state().rip = areas[1];
                t.state().gpr[Gpr::Rax as usize] = 0;
                let exit = t.run(Board { mem: &mem, bus: &EmptyBus }, u64::MAX);
                let right = matches!(exit, Exit::Intercept { what: Intercepts::SYSCALL, .. })
                    && t.state().gpr[Gpr::Rax as usize] == LINKS;
                let other = !Arc::ptr_eq(t.cache(), &cache);
                // SAFETY: ends the child at once.
                unsafe { libc::_exit(if right { i32::from(other) } else { 9 }) };
            }
            let status = wait(child);
            assert!(matches!(status, 0 | 1), "a child ended with {status}");
            seen[status as usize] += 1;
        }
        stop.store(true, Ordering::Relaxed);
        assert!(!seen.contains(&0), "{seen:?}");
    });
}

/// The exit status of a child; kills one that hangs.
fn wait(child: i32) -> i32 {
    let begin = Instant::now();
    loop {
        let mut status = 0;
        // SAFETY: our own child, with room for its status.
        let done = unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) };
        if done == child {
            return if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { 1000 + status };
        }
        if begin.elapsed() > Duration::from_secs(10) {
            // SAFETY: our own child, not yet waited for.
            unsafe {
                libc::kill(child, libc::SIGKILL);
                libc::waitpid(child, &mut status, 0);
            }
            return 2000;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// The table of branch targets begins small. A thread that never leaves the code has to find what is in the larger one.
#[test]
fn the_table_of_targets_grows_under_a_running_thread() {
    const FUNCTIONS: u64 = AREA / 3;
    let cache = Cache::new(Arc::new(CpuModel::host()), Policy::default(), 16 << 20).expect("executable memory");
    let [functions, walk, spin, stack, other, data] = std::array::from_fn(|_| map());
    let mem = space(&[functions, walk, spin, stack, other, data]);
    put(functions, |a| {
        for _ in 0..FUNCTIONS {
            a.inc(eax).unwrap();
            a.ret().unwrap();
        }
    });
    put(walk, |a| {
        let mut top = a.create_label();
        a.set_label(&mut top).unwrap();
        a.call(rdx).unwrap();
        a.add(rdx, 3).unwrap();
        a.dec(rcx).unwrap();
        a.jne(top).unwrap();
        a.syscall().unwrap();
    });
    put(spin, |a| {
        let mut top = a.create_label();
        a.set_label(&mut top).unwrap();
        a.call(rbx).unwrap();
        a.call(rbp).unwrap();
        a.mov(qword_ptr(rdi), rax).unwrap();
        a.cmp(qword_ptr(rdi + 8), 0).unwrap();
        a.je(top).unwrap();
        a.syscall().unwrap();
    });
    let counted = || word(data).load(Ordering::SeqCst);
    std::thread::scope(|s| {
        let spinner = s.spawn(|| {
            let mut t = cpu(&cache, spin, other);
            t.trace_every(0);
            // On both sides of bit 15.
            for (r, n) in [(Gpr::Rbx, 100), (Gpr::Rbp, FUNCTIONS - 100)] {
                t.state().gpr[r as usize] = functions + 3 * n;
            }
            t.state().gpr[Gpr::Rdi as usize] = data;
            until_syscall(&mut t, &mem);
            (t.state().gpr[Gpr::Rax as usize], t.stats().misses)
        });
        let mut t = cpu(&cache, walk, stack);
        // What the interpreter does while traces are looked for misses nothing.
        t.trace_every(0);
        let mut walked = Vec::new();
        for _ in 0..3 {
            let s = t.state();
            s.rip = walk;
            (s.gpr[Gpr::Rdx as usize], s.gpr[Gpr::Rcx as usize]) = (functions, FUNCTIONS);
            until_syscall(&mut t, &mem);
            walked.push(t.stats().misses);
        }
        let (then, begin) = (counted(), Instant::now());
        while counted() < then + 100_000 && begin.elapsed() < Duration::from_secs(20) {
            std::thread::yield_now();
        }
        let moved = counted() - then;
        word(data + 8).store(1, Ordering::SeqCst);
        assert_eq!(t.state().gpr[Gpr::Rax as usize], 3 * FUNCTIONS);
        assert!(walked[0] >= FUNCTIONS - 10 && walked[2] < walked[0] + 10, "{walked:?}");
        let (count, misses) = spinner.join().expect("no panic");
        assert!(moved >= 100_000 && misses < 10, "{moved} calls, {misses} misses");
        assert_eq!(count, counted());
    });
    assert_eq!(cache.stats().flushes, 0);
}
