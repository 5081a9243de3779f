//! getrlimit(2), setrlimit(2), prlimit64(2): RLIMIT_AS of the process itself is kept here; all other limits are the host's.
//!
//! Bivisor reserves address space of its own ([`ThreadBlock`]), so the host's limit would leave nothing
//! for the guest. Kept here, it counts the guest's mappings alone, also over an exec in the
//! same host process; before the host's exec the host is told.

use crate::host::thread::ThreadBlock;
use crate::linux::host::{err, host_call};
use crate::linux::syscall::{Args, Outcome, number, pass};
use crate::linux::{Process, Task};
use crate::mem::PAGE_SIZE;
use std::sync::Mutex;

/// Soft and hard limit in bytes.
type Limit = [u64; 2];

const AS: u64 = libc::RLIMIT_AS as u64;
const CAP_SYS_RESOURCE: u32 = 24;

/// RLIMIT_AS of one guest process, once it has set it.
#[derive(Debug, Default)]
pub struct AddressLimit(Mutex<Option<Limit>>);

impl AddressLimit {
    /// The same for another process.
    pub fn inherited(&self) -> AddressLimit {
        AddressLimit(Mutex::new(self.get()))
    }

    fn get(&self) -> Option<Limit> {
        *self.0.lock().expect("no panic under the lock")
    }

    /// Before the host's exec: from then on it is the host's.
    pub fn give_to_host(&self) {
        if let Some(limit) = self.get() {
            host_call(libc::SYS_setrlimit as u64, [AS, limit.as_ptr() as u64, 0, 0, 0, 0]);
        }
    }
}

impl Process {
    /// May the guest map so many bytes more (mm/mmap.c: may_expand_vm)?
    pub fn may_map(&self, more: u64) -> bool {
        let Some([soft, _]) = self.address_limit.get() else { return true };
        let mapped: u64 = self.space.flat().all().iter().map(|v| v.end - v.start).sum();
        let more = more.checked_next_multiple_of(PAGE_SIZE);
        more.and_then(|m| m.checked_add(mapped)).is_some_and(|all| all <= soft & !(PAGE_SIZE - 1))
    }
}

/// Is the limit kept here? Where the host's leaves no room for what bivisor reserves, nothing is reserved, and it stays the host's.
fn is_ours(resource: u64) -> bool {
    resource as u32 == libc::RLIMIT_AS && ThreadBlock::is_guarded()
}

fn current(task: &Task) -> Limit {
    task.process.address_limit.get().unwrap_or_else(|| {
        let mut limit = [0; 2];
        host_call(libc::SYS_getrlimit as u64, [AS, limit.as_mut_ptr() as u64, 0, 0, 0, 0]);
        limit
    })
}

fn may_raise() -> bool {
    // struct __user_cap_header_struct, version 3, the calling thread; two of struct __user_cap_data_struct.
    let (header, mut data) = ([0x2008_0522u32, 0], [0u32; 6]);
    let r = host_call(libc::SYS_capget as u64, [header.as_ptr() as u64, data.as_mut_ptr() as u64, 0, 0, 0, 0]);
    r == 0 && data[0] >> CAP_SYS_RESOURCE & 1 != 0
}

fn set(task: &Task, new: Limit) -> i64 {
    if new[0] > new[1] {
        return err(libc::EINVAL);
    }
    if new[1] > current(task)[1] && !may_raise() {
        return err(libc::EPERM);
    }
    *task.process.address_limit.0.lock().expect("no panic under the lock") = Some(new);
    0
}

fn read(task: &Task, at: u64) -> Option<Limit> {
    let mut bytes = [0; 16];
    task.process.mem().read(at, &mut bytes)?;
    let word = |i: usize| u64::from_le_bytes(bytes[8 * i..8 * i + 8].try_into().expect("8 bytes"));
    Some([word(0), word(1)])
}

fn write(task: &Task, at: u64, limit: Limit) -> i64 {
    let bytes: Vec<u8> = limit.iter().flat_map(|v| v.to_le_bytes()).collect();
    task.process.mem().write(at, &bytes).map_or(err(libc::EFAULT), |()| 0)
}

/// getrlimit(2).
pub fn getrlimit(task: &mut Task, a: Args) -> Outcome {
    if is_ours(a[0]) { write(task, a[1], current(task)).into() } else { pass_on(task, a) }
}

/// setrlimit(2).
pub fn setrlimit(task: &mut Task, a: Args) -> Outcome {
    if !is_ours(a[0]) {
        return pass_on(task, a);
    }
    read(task, a[1]).map_or(err(libc::EFAULT), |new| set(task, new)).into()
}

/// prlimit64(2).
pub fn prlimit64(task: &mut Task, a: Args) -> Outcome {
    let [pid, resource, new, old, ..] = a;
    let own = pid as i32 == 0 || pid as u32 == std::process::id();
    if !own || !is_ours(resource) {
        return pass_on(task, a);
    }
    let before = current(task);
    if new != 0 {
        let result = read(task, new).map_or(err(libc::EFAULT), |new| set(task, new));
        if result != 0 {
            return result.into();
        }
    }
    if old == 0 { 0.into() } else { write(task, old, before).into() }
}

fn pass_on(task: &mut Task, a: Args) -> Outcome {
    let number = number(task);
    pass(task, number, a).into()
}
