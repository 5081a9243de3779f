//! Every system call: its number, name, arguments, and which way it goes: passed through, handled or refused (syscalls(2)).
//!
//! Whether an interrupted call is restarted is decided by the host's kernel: the host's disposition of a signal has the guest's
//! SA_RESTART.
//!
//! The words of `args` are for [`crate::linux::strace`]: `fd`, `dir` (or AT_FDCWD), `path`, `str`, `buf` (its length is the next
//! argument), `out` (filled up to the result), `int`, `uint`, `oflags`, `mode`, `prot`, `mflags`, `sig`, `argv`, `x` (hexadecimal,
//! NULL for 0).

use crate::linux::syscall::Handler;
use crate::linux::{clone, exec, file, limits, misc, mm, sigcalls, thread};
use crate::vcpu::DIRECT_CALLS;
use libc::{EINVAL, ENOSYS, EPERM};
use std::sync::OnceLock;

/// Which way a system call goes.
#[derive(Clone, Copy)]
pub enum Status {
    /// To the host's kernel with the same arguments.
    PassedThrough,
    /// By a function of ours.
    Handled(Handler),
    /// Not at all: this errno.
    Refused(i32),
}

/// One system call.
pub struct Row {
    /// Number in RAX.
    pub number: u32,
    /// Name as in its man page.
    pub name: &'static str,
    /// Arguments for `--strace`, one word each.
    pub args: &'static str,
    /// Which way it goes.
    pub status: Status,
    /// Why, where it is not plain.
    pub note: &'static str,
}

/// The row of a number.
pub fn row(number: u32) -> Option<&'static Row> {
    // The numbers have one hole, 337 to 423; after it they are 87 less their index.
    let index = if number >= 424 { number - 87 } else { number };
    ROWS.get(index as usize).filter(|r| r.number == number)
}

/// 0 for the numbers of the calls that are passed through.
pub fn direct() -> &'static [u8; DIRECT_CALLS] {
    static TABLE: OnceLock<[u8; DIRECT_CALLS]> = OnceLock::new();
    TABLE.get_or_init(|| {
        std::array::from_fn(|n| !row(n as u32).is_some_and(|r| matches!(r.status, Status::PassedThrough)) as u8)
    })
}

/// Passed through.
const fn pass(number: u32, name: &'static str, args: &'static str) -> Row {
    note(number, name, args, "")
}

/// Passed through with something to say about it.
const fn note(number: u32, name: &'static str, args: &'static str, note: &'static str) -> Row {
    Row { number, name, args, status: Status::PassedThrough, note }
}

/// Handled.
const fn own(number: u32, name: &'static str, args: &'static str, handler: Handler, note: &'static str) -> Row {
    Row { number, name, args, status: Status::Handled(handler), note }
}

/// Refused.
const fn no(number: u32, name: &'static str, args: &'static str, errno: i32, note: &'static str) -> Row {
    Row { number, name, args, status: Status::Refused(errno), note }
}

const MAPS: &str = "recorded; never executable on the host; bivisor's own memory counts as not mapped";
const PROC: &str = "/proc/self/exe, maps and their like show the guest";
const FDS: &str = "descriptors of bivisor count as closed";
const SIGNALS: &str = "kept here for what the guest handles; the rest is the host's";
const MASK: &str = "the host swaps its mask; handlers are told";
const TASKS: &str =
    "a host process or thread each, with an engine of its own; CLONE_VM needs CLONE_VFORK or CLONE_THREAD";
const EXEC: &str = "bivisor goes on with the program, or the host executes bivisor with it";
const LIMITS: &str =
    "RLIMIT_AS of the process itself is kept here and counts what the guest maps; the rest is the host's";
const UNDONE: &str = "passed through; the next exec, which undoes it, is the host's";
const GONE: &str = "not in this kernel either";

/// All of them in order of number.
#[rustfmt::skip]
pub static ROWS: &[Row] = &[
    pass(0, "read", "fd out uint"),
    pass(1, "write", "fd buf uint"),
    own(2, "open", "path oflags mode", file::open, PROC),
    own(3, "close", "fd", file::close, FDS),
    own(4, "stat", "path x", file::path_first, PROC),
    pass(5, "fstat", "fd x"),
    pass(6, "lstat", "path x"),
    pass(7, "poll", "x uint int"),
    pass(8, "lseek", "fd int int"),
    own(9, "mmap", "x uint prot mflags fd x", mm::mmap, MAPS),
    own(10, "mprotect", "x uint prot", mm::mprotect, MAPS),
    own(11, "munmap", "x uint", mm::munmap, MAPS),
    own(12, "brk", "x", mm::brk, "the guest's heap is a mapping of its own"),
    own(13, "rt_sigaction", "sig x x uint", sigcalls::rt_sigaction, SIGNALS),
    own(14, "rt_sigprocmask", "int x x uint", sigcalls::rt_sigprocmask, SIGNALS),
    own(15, "rt_sigreturn", "", sigcalls::rt_sigreturn, SIGNALS),
    pass(16, "ioctl", "fd x x"),
    pass(17, "pread64", "fd out uint int"),
    pass(18, "pwrite64", "fd buf uint int"),
    pass(19, "readv", "fd x uint"),
    pass(20, "writev", "fd x uint"),
    own(21, "access", "path int", file::path_first, PROC),
    pass(22, "pipe", "x"),
    pass(23, "select", "int x x x x"),
    pass(24, "sched_yield", ""),
    own(25, "mremap", "x uint uint x x", mm::mremap, MAPS),
    own(26, "msync", "x uint x", mm::on_own_range, MAPS),
    own(27, "mincore", "x uint x", mm::on_own_range, MAPS),
    own(28, "madvise", "x uint int", mm::madvise, MAPS),
    pass(29, "shmget", "x uint x"),
    own(30, "shmat", "int x x", mm::shmat, MAPS),
    pass(31, "shmctl", "int int x"),
    pass(32, "dup", "fd"),
    own(33, "dup2", "fd fd", file::dup_onto, FDS),
    pass(34, "pause", ""),
    pass(35, "nanosleep", "x x"),
    pass(36, "getitimer", "int x"),
    pass(37, "alarm", "uint"),
    pass(38, "setitimer", "int x x"),
    pass(39, "getpid", ""),
    pass(40, "sendfile", "fd fd x uint"),
    pass(41, "socket", "int int int"),
    pass(42, "connect", "fd x uint"),
    pass(43, "accept", "fd x x"),
    pass(44, "sendto", "fd buf uint x x uint"),
    pass(45, "recvfrom", "fd out uint x x x"),
    pass(46, "sendmsg", "fd x x"),
    pass(47, "recvmsg", "fd x x"),
    pass(48, "shutdown", "fd int"),
    pass(49, "bind", "fd x uint"),
    pass(50, "listen", "fd int"),
    pass(51, "getsockname", "fd x x"),
    pass(52, "getpeername", "fd x x"),
    pass(53, "socketpair", "int int int x"),
    pass(54, "setsockopt", "fd int int x uint"),
    pass(55, "getsockopt", "fd int int x x"),
    own(56, "clone", "x x x x x", clone::clone, TASKS),
    own(57, "fork", "", clone::fork, TASKS),
    own(58, "vfork", "", clone::vfork, TASKS),
    own(59, "execve", "path argv x", exec::execve, EXEC),
    own(60, "exit", "int", thread::exit, ""),
    pass(61, "wait4", "int x x x"),
    pass(62, "kill", "int sig"),
    pass(63, "uname", "x"),
    pass(64, "semget", "x int x"),
    pass(65, "semop", "int x uint"),
    pass(66, "semctl", "int int int x"),
    own(67, "shmdt", "x", mm::shmdt, MAPS),
    pass(68, "msgget", "x x"),
    pass(69, "msgsnd", "int x uint x"),
    pass(70, "msgrcv", "int x uint int x"),
    pass(71, "msgctl", "int int x"),
    own(72, "fcntl", "fd int x", file::on_fd, FDS),
    pass(73, "flock", "fd int"),
    pass(74, "fsync", "fd"),
    pass(75, "fdatasync", "fd"),
    pass(76, "truncate", "path int"),
    pass(77, "ftruncate", "fd int"),
    pass(78, "getdents", "fd x uint"),
    pass(79, "getcwd", "x uint"),
    pass(80, "chdir", "path"),
    pass(81, "fchdir", "fd"),
    pass(82, "rename", "path path"),
    pass(83, "mkdir", "path mode"),
    pass(84, "rmdir", "path"),
    pass(85, "creat", "path mode"),
    pass(86, "link", "path path"),
    pass(87, "unlink", "path"),
    pass(88, "symlink", "path path"),
    own(89, "readlink", "path out uint", file::readlink, PROC),
    pass(90, "chmod", "path mode"),
    pass(91, "fchmod", "fd mode"),
    pass(92, "chown", "path int int"),
    pass(93, "fchown", "fd int int"),
    pass(94, "lchown", "path int int"),
    pass(95, "umask", "mode"),
    pass(96, "gettimeofday", "x x"),
    own(97, "getrlimit", "int x", limits::getrlimit, LIMITS),
    pass(98, "getrusage", "int x"),
    pass(99, "sysinfo", "x"),
    pass(100, "times", "x"),
    no(101, "ptrace", "int int x x", EPERM, "the tracer would see the virtual machine, not the guest"),
    pass(102, "getuid", ""),
    pass(103, "syslog", "int x int"),
    pass(104, "getgid", ""),
    own(105, "setuid", "int", misc::until_exec, UNDONE),
    own(106, "setgid", "int", misc::until_exec, UNDONE),
    pass(107, "geteuid", ""),
    pass(108, "getegid", ""),
    pass(109, "setpgid", "int int"),
    pass(110, "getppid", ""),
    pass(111, "getpgrp", ""),
    pass(112, "setsid", ""),
    own(113, "setreuid", "int int", misc::until_exec, UNDONE),
    own(114, "setregid", "int int", misc::until_exec, UNDONE),
    pass(115, "getgroups", "int x"),
    pass(116, "setgroups", "int x"),
    own(117, "setresuid", "int int int", misc::until_exec, UNDONE),
    pass(118, "getresuid", "x x x"),
    own(119, "setresgid", "int int int", misc::until_exec, UNDONE),
    pass(120, "getresgid", "x x x"),
    pass(121, "getpgid", "int"),
    own(122, "setfsuid", "int", misc::until_exec, UNDONE),
    own(123, "setfsgid", "int", misc::until_exec, UNDONE),
    pass(124, "getsid", "int"),
    pass(125, "capget", "x x"),
    own(126, "capset", "x x", misc::until_exec, UNDONE),
    own(127, "rt_sigpending", "x uint", sigcalls::rt_sigpending, SIGNALS),
    own(128, "rt_sigtimedwait", "x x x uint", sigcalls::rt_sigtimedwait, "EINTR whatever SA_RESTART says"),
    pass(129, "rt_sigqueueinfo", "int sig x"),
    own(130, "rt_sigsuspend", "x uint", sigcalls::rt_sigsuspend, MASK),
    own(131, "sigaltstack", "x x", sigcalls::sigaltstack, "the host thread has one of its own"),
    pass(132, "utime", "path x"),
    pass(133, "mknod", "path mode x"),
    no(134, "uselib", "path", ENOSYS, GONE),
    own(135, "personality", "x", misc::personality, "READ_IMPLIES_EXEC is refused"),
    pass(136, "ustat", "x x"),
    pass(137, "statfs", "path x"),
    pass(138, "fstatfs", "fd x"),
    pass(139, "sysfs", "int x x"),
    pass(140, "getpriority", "int int"),
    pass(141, "setpriority", "int int int"),
    pass(142, "sched_setparam", "int x"),
    pass(143, "sched_getparam", "int x"),
    pass(144, "sched_setscheduler", "int int x"),
    pass(145, "sched_getscheduler", "int"),
    pass(146, "sched_get_priority_max", "int"),
    pass(147, "sched_get_priority_min", "int"),
    pass(148, "sched_rr_get_interval", "int x"),
    own(149, "mlock", "x uint", mm::on_own_range, MAPS),
    own(150, "munlock", "x uint", mm::on_own_range, MAPS),
    own(151, "mlockall", "x", misc::until_exec, "locks bivisor's memory too; the next exec is the host's"),
    pass(152, "munlockall", ""),
    pass(153, "vhangup", ""),
    no(154, "modify_ldt", "int x uint", ENOSYS, "no local descriptor table in a flat process"),
    pass(155, "pivot_root", "path path"),
    no(156, "_sysctl", "x", ENOSYS, GONE),
    own(157, "prctl", "int x x x x", misc::prctl, "what would change bivisor instead of the guest is refused"),
    own(158, "arch_prctl", "x x", misc::arch_prctl, "the bases of FS and GS are the virtual CPU's"),
    pass(159, "adjtimex", "x"),
    own(160, "setrlimit", "int x", limits::setrlimit, LIMITS),
    pass(161, "chroot", "path"),
    pass(162, "sync", ""),
    pass(163, "acct", "path"),
    pass(164, "settimeofday", "x x"),
    pass(165, "mount", "str path str x x"),
    pass(166, "umount2", "path x"),
    pass(167, "swapon", "path x"),
    pass(168, "swapoff", "path"),
    pass(169, "reboot", "x x x x"),
    pass(170, "sethostname", "str uint"),
    pass(171, "setdomainname", "str uint"),
    no(172, "iopl", "int", EPERM, "the virtual CPU has no ports to give away"),
    no(173, "ioperm", "x uint int", EPERM, "the virtual CPU has no ports to give away"),
    no(174, "create_module", "", ENOSYS, GONE),
    pass(175, "init_module", "x uint str"),
    pass(176, "delete_module", "str x"),
    no(177, "get_kernel_syms", "", ENOSYS, GONE),
    no(178, "query_module", "", ENOSYS, GONE),
    pass(179, "quotactl", "x str x x"),
    no(180, "nfsservctl", "", ENOSYS, GONE),
    no(181, "getpmsg", "", ENOSYS, GONE),
    no(182, "putpmsg", "", ENOSYS, GONE),
    no(183, "afs_syscall", "", ENOSYS, GONE),
    no(184, "tuxcall", "", ENOSYS, GONE),
    no(185, "security", "", ENOSYS, GONE),
    pass(186, "gettid", ""),
    pass(187, "readahead", "fd int uint"),
    pass(188, "setxattr", "path str x uint x"),
    pass(189, "lsetxattr", "path str x uint x"),
    pass(190, "fsetxattr", "fd str x uint x"),
    pass(191, "getxattr", "path str x uint"),
    pass(192, "lgetxattr", "path str x uint"),
    pass(193, "fgetxattr", "fd str x uint"),
    pass(194, "listxattr", "path x uint"),
    pass(195, "llistxattr", "path x uint"),
    pass(196, "flistxattr", "fd x uint"),
    pass(197, "removexattr", "path str"),
    pass(198, "lremovexattr", "path str"),
    pass(199, "fremovexattr", "fd str"),
    pass(200, "tkill", "int sig"),
    pass(201, "time", "x"),
    pass(202, "futex", "x x int x x x"),
    pass(203, "sched_setaffinity", "int uint x"),
    pass(204, "sched_getaffinity", "int uint x"),
    no(205, "set_thread_area", "x", ENOSYS, "for 32-bit programs only"),
    own(206, "io_setup", "uint x", misc::until_exec, UNDONE),
    pass(207, "io_destroy", "x"),
    pass(208, "io_getevents", "x int int x x"),
    pass(209, "io_submit", "x int x"),
    pass(210, "io_cancel", "x x x"),
    no(211, "get_thread_area", "x", ENOSYS, "for 32-bit programs only"),
    no(212, "lookup_dcookie", "x x uint", ENOSYS, GONE),
    pass(213, "epoll_create", "int"),
    no(214, "epoll_ctl_old", "", ENOSYS, GONE),
    no(215, "epoll_wait_old", "", ENOSYS, GONE),
    no(216, "remap_file_pages", "x uint x uint x", ENOSYS, "deprecated; nobody has been seen to use it"),
    pass(217, "getdents64", "fd x uint"),
    own(218, "set_tid_address", "x", thread::set_tid_address, "the host's address belongs to the C library"),
    no(219, "restart_syscall", "", libc::EINTR, "bivisor restarts interrupted calls itself"),
    pass(220, "semtimedop", "int x uint x"),
    pass(221, "fadvise64", "fd int uint int"),
    own(222, "timer_create", "int x x", misc::until_exec, UNDONE),
    pass(223, "timer_settime", "int int x x"),
    pass(224, "timer_gettime", "int x"),
    pass(225, "timer_getoverrun", "int"),
    pass(226, "timer_delete", "int"),
    pass(227, "clock_settime", "int x"),
    pass(228, "clock_gettime", "int x"),
    pass(229, "clock_getres", "int x"),
    pass(230, "clock_nanosleep", "int int x x"),
    own(231, "exit_group", "int", misc::exit_group, ""),
    pass(232, "epoll_wait", "fd x int int"),
    pass(233, "epoll_ctl", "fd int fd x"),
    pass(234, "tgkill", "int int sig"),
    pass(235, "utimes", "path x"),
    no(236, "vserver", "", ENOSYS, GONE),
    own(237, "mbind", "x uint int x uint x", mm::on_own_range, MAPS),
    pass(238, "set_mempolicy", "int x uint"),
    pass(239, "get_mempolicy", "x x uint x x"),
    pass(240, "mq_open", "str oflags mode x"),
    pass(241, "mq_unlink", "str"),
    pass(242, "mq_timedsend", "fd buf uint uint x"),
    pass(243, "mq_timedreceive", "fd out uint x x"),
    pass(244, "mq_notify", "fd x"),
    pass(245, "mq_getsetattr", "fd x x"),
    pass(246, "kexec_load", "x x x x"),
    pass(247, "waitid", "int int x x x"),
    own(248, "add_key", "str str x uint int", misc::until_exec, UNDONE),
    own(249, "request_key", "str str str int", misc::until_exec, UNDONE),
    own(250, "keyctl", "int x x x x", misc::until_exec, UNDONE),
    pass(251, "ioprio_set", "int int int"),
    pass(252, "ioprio_get", "int int"),
    pass(253, "inotify_init", ""),
    pass(254, "inotify_add_watch", "fd path x"),
    pass(255, "inotify_rm_watch", "fd int"),
    pass(256, "migrate_pages", "int uint x x"),
    own(257, "openat", "dir path oflags mode", file::openat, PROC),
    pass(258, "mkdirat", "dir path mode"),
    pass(259, "mknodat", "dir path mode x"),
    pass(260, "fchownat", "dir path int int x"),
    pass(261, "futimesat", "dir path x"),
    own(262, "newfstatat", "dir path x x", file::path_second, PROC),
    pass(263, "unlinkat", "dir path x"),
    pass(264, "renameat", "dir path dir path"),
    pass(265, "linkat", "dir path dir path x"),
    pass(266, "symlinkat", "path dir path"),
    own(267, "readlinkat", "dir path out uint", file::readlinkat, PROC),
    pass(268, "fchmodat", "dir path mode"),
    own(269, "faccessat", "dir path int", file::path_second, PROC),
    own(270, "pselect6", "int x x x x x", sigcalls::pselect6, MASK),
    own(271, "ppoll", "x uint x x uint", sigcalls::ppoll, MASK),
    pass(272, "unshare", "x"),
    pass(273, "set_robust_list", "x uint"),
    pass(274, "get_robust_list", "int x x"),
    pass(275, "splice", "fd x fd x uint x"),
    pass(276, "tee", "fd fd uint x"),
    pass(277, "sync_file_range", "fd int int x"),
    pass(278, "vmsplice", "fd x uint x"),
    pass(279, "move_pages", "int uint x x x x"),
    pass(280, "utimensat", "dir path x x"),
    own(281, "epoll_pwait", "fd x int int x uint", sigcalls::epoll_pwait, MASK),
    pass(282, "signalfd", "fd x uint"),
    pass(283, "timerfd_create", "int x"),
    pass(284, "eventfd", "uint"),
    pass(285, "fallocate", "fd x int int"),
    pass(286, "timerfd_settime", "fd x x x"),
    pass(287, "timerfd_gettime", "fd x"),
    pass(288, "accept4", "fd x x x"),
    pass(289, "signalfd4", "fd x uint x"),
    pass(290, "eventfd2", "uint x"),
    pass(291, "epoll_create1", "x"),
    own(292, "dup3", "fd fd oflags", file::dup_onto, FDS),
    pass(293, "pipe2", "x oflags"),
    pass(294, "inotify_init1", "x"),
    pass(295, "preadv", "fd x uint int int"),
    pass(296, "pwritev", "fd x uint int int"),
    pass(297, "rt_tgsigqueueinfo", "int int sig x"),
    own(298, "perf_event_open", "x int int fd x", misc::until_exec, UNDONE),
    pass(299, "recvmmsg", "fd x uint x x"),
    pass(300, "fanotify_init", "x x"),
    pass(301, "fanotify_mark", "fd x x dir path"),
    own(302, "prlimit64", "int int x x", limits::prlimit64, LIMITS),
    pass(303, "name_to_handle_at", "dir path x x x"),
    pass(304, "open_by_handle_at", "fd x oflags"),
    pass(305, "clock_adjtime", "int x"),
    pass(306, "syncfs", "fd"),
    pass(307, "sendmmsg", "fd x uint x"),
    pass(308, "setns", "fd x"),
    pass(309, "getcpu", "x x x"),
    pass(310, "process_vm_readv", "int x uint x uint x"),
    note(311, "process_vm_writev", "int x uint x uint x", "code written into another guest is not noticed there"),
    pass(312, "kcmp", "int int int x x"),
    pass(313, "finit_module", "fd str x"),
    pass(314, "sched_setattr", "int x x"),
    pass(315, "sched_getattr", "int x uint x"),
    pass(316, "renameat2", "dir path dir path x"),
    no(317, "seccomp", "int x x", EINVAL, "a filter would hit bivisor's own calls"),
    pass(318, "getrandom", "x uint x"),
    pass(319, "memfd_create", "str x"),
    pass(320, "kexec_file_load", "fd fd uint str x"),
    pass(321, "bpf", "int x uint"),
    own(322, "execveat", "dir path argv x x", exec::execveat, EXEC),
    no(323, "userfaultfd", "x", ENOSYS, "faults of bivisor itself would wait for the guest"),
    pass(324, "membarrier", "int x int"),
    own(325, "mlock2", "x uint x", mm::on_own_range, MAPS),
    pass(326, "copy_file_range", "fd x fd x uint x"),
    pass(327, "preadv2", "fd x uint int int x"),
    pass(328, "pwritev2", "fd x uint int int x"),
    own(329, "pkey_mprotect", "x uint prot int", mm::pkey_mprotect, "the offered CPU has no protection keys"),
    no(330, "pkey_alloc", "x x", libc::ENOSPC, "the offered CPU has no protection keys"),
    no(331, "pkey_free", "int", EINVAL, "the offered CPU has no protection keys"),
    own(332, "statx", "dir path x x x", file::path_second, PROC),
    own(333, "io_pgetevents", "x int int x x x", sigcalls::io_pgetevents, MASK),
    no(334, "rseq", "x uint x x", ENOSYS, "the host restarts host code, not guest code"),
    no(335, "uretprobe", "", ENOSYS, "the kernel's own trampoline"),
    no(336, "uprobe", "", ENOSYS, "the kernel's own trampoline"),
    pass(424, "pidfd_send_signal", "fd sig x x"),
    no(425, "io_uring_setup", "uint x", ENOSYS, "calls made through a ring would bypass this table"),
    no(426, "io_uring_enter", "fd uint uint x x uint", ENOSYS, "as io_uring_setup"),
    no(427, "io_uring_register", "fd uint x uint", ENOSYS, "as io_uring_setup"),
    pass(428, "open_tree", "dir path x"),
    pass(429, "move_mount", "dir path dir path x"),
    pass(430, "fsopen", "str x"),
    pass(431, "fsconfig", "fd int str x int"),
    pass(432, "fsmount", "fd x x"),
    pass(433, "fspick", "dir path x"),
    pass(434, "pidfd_open", "int x"),
    own(435, "clone3", "x uint", clone::clone3, TASKS),
    own(436, "close_range", "fd fd x", file::close_range, FDS),
    own(437, "openat2", "dir path x uint", file::openat2, PROC),
    pass(438, "pidfd_getfd", "fd fd x"),
    own(439, "faccessat2", "dir path int x", file::path_second, PROC),
    pass(440, "process_madvise", "fd x uint int x"),
    own(441, "epoll_pwait2", "fd x int x x uint", sigcalls::epoll_pwait2, MASK),
    pass(442, "mount_setattr", "dir path x x uint"),
    pass(443, "quotactl_fd", "fd x x x"),
    pass(444, "landlock_create_ruleset", "x uint x"),
    pass(445, "landlock_add_rule", "fd int x x"),
    note(446, "landlock_restrict_self", "fd x", "exec needs bivisor's own file too"),
    pass(447, "memfd_secret", "x"),
    pass(448, "process_mrelease", "fd x"),
    pass(449, "futex_waitv", "x uint x x int"),
    own(450, "set_mempolicy_home_node", "x uint uint x", mm::on_own_range, MAPS),
    pass(451, "cachestat", "fd x x x"),
    pass(452, "fchmodat2", "dir path mode x"),
    no(453, "map_shadow_stack", "x uint x", ENOSYS, "the offered CPU has no shadow stacks"),
    pass(454, "futex_wake", "x x int x"),
    pass(455, "futex_wait", "x x x x x int"),
    pass(456, "futex_requeue", "x x int int"),
    pass(457, "statmount", "x x uint x"),
    pass(458, "listmount", "x x uint x"),
    pass(459, "lsm_get_self_attr", "uint x x x"),
    pass(460, "lsm_set_self_attr", "uint x uint x"),
    pass(461, "lsm_list_modules", "x x x"),
    no(462, "mseal", "x uint x", ENOSYS, "a sealed page cannot be write-protected to notice changed code"),
    pass(463, "setxattrat", "dir path x str x uint"),
    pass(464, "getxattrat", "dir path x str x uint"),
    pass(465, "listxattrat", "dir path x x uint"),
    pass(466, "removexattrat", "dir path x str"),
    pass(467, "open_tree_attr", "dir path x x uint"),
    pass(468, "file_getattr", "dir path x uint x"),
    pass(469, "file_setattr", "dir path x uint x"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_found_by_its_number() {
        for r in ROWS {
            assert_eq!(row(r.number).map(|found| found.name), Some(r.name));
        }
        assert!(row(337).is_none() && row(423).is_none() && row(470).is_none() && row(u32::MAX).is_none());
    }

    /// The C library's numbers are the kernel's.
    #[test]
    fn numbers_match_the_headers() {
        for (number, name) in [
            (libc::SYS_read, "read"),
            (libc::SYS_rt_sigtimedwait, "rt_sigtimedwait"),
            (libc::SYS_futex, "futex"),
            (libc::SYS_openat, "openat"),
            (libc::SYS_statx, "statx"),
            (libc::SYS_rseq, "rseq"),
            (libc::SYS_pidfd_send_signal, "pidfd_send_signal"),
            (libc::SYS_clone3, "clone3"),
            (libc::SYS_futex_waitv, "futex_waitv"),
            (libc::SYS_mseal, "mseal"),
        ] {
            assert_eq!(row(number as u32).map(|r| r.name), Some(name));
        }
    }

    #[test]
    fn refused_calls_say_why() {
        let silent = ROWS.iter().find(|r| matches!(r.status, Status::Refused(_)) && r.note.is_empty());
        assert!(silent.is_none(), "{}", silent.map_or("", |r| r.name));
    }
}
