//! The virtual machine as KVM sees it: file descriptors, memory slots, and the few calls that `kvm-ioctls` leaves unsafe or out
//! (Documentation/virt/kvm/api.rst).
#![allow(unsafe_code)]

use bivisor_emulator::host::fds;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_device_attr, kvm_userspace_memory_region, kvm_xsave};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use memmap2::MmapRaw;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// Zeroed host memory that a guest may write at any time: page tables, descriptor tables, stubs.
pub struct Pages {
    map: MmapRaw,
}

impl Pages {
    /// `len` bytes; the host gives memory when they are touched.
    pub fn new(len: usize) -> io::Result<Pages> {
        let map = memmap2::MmapOptions::new().len(len).no_reserve_swap().map_anon()?;
        Ok(Pages { map: MmapRaw::from(map) })
    }

    /// Host address.
    pub fn host(&self) -> u64 {
        self.map.as_ptr() as u64
    }

    /// Size in bytes.
    pub fn len(&self) -> u64 {
        self.map.len() as u64
    }

    fn word(&self, offset: u64) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.len(), "offset is ours");
        // SAFETY: aligned and inside the mapping, which is only ever accessed as atomics or by the guest.
        unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().add(offset as usize).cast()) }
    }

    /// Reads an aligned word.
    pub fn load(&self, offset: u64) -> u64 {
        self.word(offset).load(Ordering::Relaxed)
    }

    /// Writes an aligned word.
    pub fn store(&self, offset: u64, v: u64) {
        self.word(offset).store(v, Ordering::Release);
    }

    /// Copies bytes in.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        assert!(offset + bytes.len() as u64 <= self.len(), "offset is ours");
        // SAFETY: in range; raw memory, no reference into it exists.
        unsafe {
            let to = self.map.as_mut_ptr().add(offset as usize);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }
}

/// A virtual machine: memory slots from a guest-physical address to host memory.
pub struct Vm {
    fd: VmFd,
    slots: u32,
    /// Ours, of which the guest must not know.
    descriptors: Vec<RawFd>,
    /// Memory behind slots that is ours.
    owned: Vec<Pages>,
}

impl Vm {
    /// An empty one.
    pub fn new() -> io::Result<Vm> {
        let kvm = Kvm::new().map_err(host_error)?;
        let fd = loop {
            match kvm.create_vm() {
                Ok(fd) => break fd,
                Err(e) if e.errno() == libc::EINTR => continue,
                Err(e) => return Err(host_error(e)),
            }
        };
        // SAFETY: the descriptor was just made, is a virtual machine's, and is given over.
        let fd = unsafe { kvm.create_vmfd_from_rawfd(kept(&borrowed(&fd))?) }.map_err(host_error)?;
        Ok(Vm { descriptors: vec![fd.as_raw_fd()], fd, slots: 0, owned: Vec::new() })
    }

    /// The virtual machine's descriptor.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// The virtual machine's descriptor once more, for other threads.
    pub fn second(&mut self) -> io::Result<VmFd> {
        let kvm = Kvm::new().map_err(host_error)?;
        let high = kept(&borrowed(&self.fd))?;
        self.descriptors.push(high);
        // SAFETY: as in `new`.
        unsafe { kvm.create_vmfd_from_rawfd(high) }.map_err(host_error)
    }

    /// A virtual CPU; it must not outlive the virtual machine.
    pub fn vcpu(&mut self, id: u64) -> io::Result<VcpuFd> {
        let vcpu = self.fd.create_vcpu(id).map_err(host_error)?;
        let high = kept(&borrowed(&vcpu))?;
        self.descriptors.push(high);
        // SAFETY: the descriptor is a vCPU's and is given over.
        unsafe { self.fd.create_vcpu_from_rawfd(high) }.map_err(host_error)
    }

    /// Makes `len` bytes of host memory at `host` the guest's at `gpa`. The memory may be unmapped, mapped anew or protected at any
    /// time: KVM follows. Gives the slot's number.
    ///
    /// The caller means the guest to have that memory: RAM, or the guest's part of a flat address space.
    pub fn map(&mut self, gpa: u64, host: u64, len: u64, log_writes: bool) -> io::Result<u32> {
        let slot = self.slots;
        self.set_slot(slot, gpa, host, len, log_writes)?;
        self.slots += 1;
        Ok(slot)
    }

    /// Changes or (with `len` 0) deletes a slot.
    pub fn set_slot(&self, slot: u32, gpa: u64, host: u64, len: u64, log_writes: bool) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: if log_writes { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: gpa,
            memory_size: len,
            userspace_addr: host,
        };
        // SAFETY: the memory is the guest's to change; Rust holds no reference into it. KVM keeps no pointer to what is unmapped.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(host_error)
    }

    /// Drops everything KVM has cached of guest page tables, by a slot that comes and goes: the only way that works for software KVM
    /// as well.
    pub fn flush(&mut self) -> io::Result<()> {
        let Some(any) = self.owned.first() else { return Ok(()) };
        let host = any.host();
        let slot = self.slots;
        self.set_slot(slot, FLUSH_ADDRESS, host, 4096, false)?;
        self.set_slot(slot, FLUSH_ADDRESS, host, 0, false)
    }

    /// New zeroed guest memory at `gpa` that lives as long as the virtual machine.
    pub fn map_new(&mut self, gpa: u64, len: usize) -> io::Result<usize> {
        let pages = Pages::new(len)?;
        self.map(gpa, pages.host(), pages.len(), false)?;
        self.owned.push(pages);
        Ok(self.owned.len() - 1)
    }

    /// Memory from [`Vm::map_new`].
    pub fn pages(&self, index: usize) -> &Pages {
        &self.owned[index]
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Their owners close them.
        self.descriptors.iter().for_each(|&fd| fds::forget(fd));
    }
}

/// The three pages for VT-x's real mode.
pub const TSS_ADDRESS: u64 = 0xfffb_d000;
/// Where [`Vm::flush`] puts its slot.
const FLUSH_ADDRESS: u64 = 0xfe00_0000;

/// `kvm-ioctls` errors are errno values.
pub fn host_error(e: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(e.errno())
}

fn borrowed<T: AsRawFd>(fd: &T) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as its owner is borrowed.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

/// A second descriptor for the same thing, out of the guest's way; the wrapper keeps (and closes) the first.
fn kept(fd: &impl AsFd) -> io::Result<RawFd> {
    Ok(fds::keep(fd.as_fd().try_clone_to_owned()?))
}

/// The extended state, as KVM keeps it: the host's standard XSAVE format.
pub fn set_xsave(vcpu: &VcpuFd, xsave: &kvm_xsave) -> io::Result<()> {
    // SAFETY: no dynamically enabled component is ever requested, so 4096 bytes are all KVM reads.
    unsafe { vcpu.set_xsave(xsave) }.map_err(host_error)
}

/// Makes the guest's time-stamp counter the host's plus `offset`; software KVM shows the host's anyway.
pub fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) {
    // KVM_VCPU_TSC_CTRL and KVM_VCPU_TSC_OFFSET are both 0 (Documentation/virt/kvm/devices/vcpu.rst).
    let attr = kvm_device_attr { group: 0, attr: 0, addr: &raw const offset as u64, ..Default::default() };
    const KVM_SET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee1;
    // SAFETY: reads the structure and the word it points to, both live.
    unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR, &raw const attr) };
}

/// The byte that makes KVM_RUN return at once, for a signal handler to set.
pub fn immediate_exit(vcpu: &mut VcpuFd) -> *const AtomicU8 {
    (&raw mut vcpu.get_kvm_run().immediate_exit).cast_const().cast()
}

/// A word that reads false after fork in the child, which has no use of its parent's virtual machines; a child that shares the
/// address space (CLONE_VM) may go on with them and reads true.
pub struct SameAddressSpace {
    page: MmapRaw,
}

impl SameAddressSpace {
    /// Reads true from now on in this address space.
    pub fn new() -> io::Result<SameAddressSpace> {
        let page = MmapRaw::from(memmap2::MmapOptions::new().len(4096).map_anon()?);
        // SAFETY: our own mapping; the word is only accessed as an atomic.
        unsafe {
            if libc::madvise(page.as_mut_ptr().cast(), 4096, libc::MADV_WIPEONFORK) != 0 {
                return Err(io::Error::last_os_error());
            }
            AtomicU8::from_ptr(page.as_mut_ptr()).store(1, Ordering::SeqCst);
        }
        Ok(SameAddressSpace { page })
    }

    /// Is this still the address space it was made in?
    pub fn holds(&self) -> bool {
        // SAFETY: as above.
        unsafe { AtomicU8::from_ptr(self.page.as_mut_ptr()) }.load(Ordering::Relaxed) == 1
    }
}

/// Asks the host for the pages of a range of the guest's memory, so that the guest does not fault on each of them.
pub fn populate(start: u64, len: u64, write: bool) {
    let advice = if write { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ };
    // SAFETY: reads or, as a write of the old value, touches the guest's pages; failure is of no consequence.
    unsafe { libc::madvise(start as *mut libc::c_void, len as usize, advice) };
}

/// Makes one huge page of private anonymous memory of the guest's that is aligned to it; false where the host cannot (transparent huge
/// pages switched off, no memory in one piece, Linux before 6.1: madvise(2) MADV_COLLAPSE).
pub fn huge_page(start: u64, len: u64) -> bool {
    let advise = |advice| {
        // SAFETY: how memory is backed, not what it holds: nothing the guest or anybody else reads changes.
        unsafe { libc::madvise(start as *mut libc::c_void, len as usize, advice) == 0 }
    };
    advise(libc::MADV_HUGEPAGE) && advise(libc::MADV_POPULATE_WRITE) && advise(libc::MADV_COLLAPSE)
}

/// A port access that left the guest: one instruction, for INS and OUTS perhaps several elements.
pub struct PortAccess<'a> {
    /// The port.
    pub port: u16,
    /// Bytes of one element: 1, 2 or 4.
    pub size: usize,
    /// IN: the data is to be filled.
    pub input: bool,
    /// The elements.
    pub data: &'a mut [u8],
}

/// The port access of the last exit, which was KVM_EXIT_IO.
pub fn port_access(vcpu: &mut VcpuFd) -> PortAccess<'_> {
    let run = vcpu.get_kvm_run();
    let base: *mut u8 = std::ptr::from_mut(run).cast();
    // SAFETY: the exit reason says which part of the union is valid; the data lies inside the mapping of the vCPU, where the kernel
    // says, and is borrowed as long as the vCPU.
    unsafe {
        let io = run.__bindgen_anon_1.io;
        let len = usize::from(io.size) * io.count as usize;
        let data = std::slice::from_raw_parts_mut(base.add(io.data_offset as usize), len);
        PortAccess { port: io.port, size: usize::from(io.size).max(1), input: io.direction == 0, data }
    }
}

/// Why KVM gave up: KVM_INTERNAL_ERROR_*; the last exit was KVM_EXIT_INTERNAL_ERROR.
pub fn internal_error(vcpu: &mut VcpuFd) -> u32 {
    // SAFETY: the exit reason says which part of the union is valid; it is plain data.
    unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror }
}
