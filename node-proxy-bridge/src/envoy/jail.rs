//! Which system calls Envoy may make, by an allow-list that the kernel holds it to (seccomp(2), since Linux 3.5).
//!
//! Invariant: what is not named here is answered with EPERM, also after another program was run, and nothing takes the
//! list back. EPERM rather than the end of the process: a newer Envoy that tries a call that this one doesn't know
//! loses what it wanted, and not the connections of all pods of the node; a refused call does nothing either way.
//!
//! Found by tracing Envoy 1.40 through all tests of this package and a node's life, with the neighbours of the same
//! power beside them (`dup` and `dup3`), so that another libc doesn't matter.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};

/// Threads, memory, time, and what a process may ask about itself.
const SELF: &[i64] = &[
    libc::SYS_brk,
    // `NO_CLONE3` answers it; without a name here it would get EPERM, and glibc goes back to clone(2) on ENOSYS alone.
    libc::SYS_clone3,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getcpu,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_getuid,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mincore,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_prlimit64,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_sigaltstack,
    libc::SYS_sysinfo,
    libc::SYS_tgkill,
    libc::SYS_uname,
];

/// Files, as far as its user may, and what waits for them.
const FILES: &[i64] = &[
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_pipe2,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_read,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_statx,
    libc::SYS_unlinkat,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Sockets that it has.
const SOCKETS: &[i64] = &[
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_listen,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_socketpair,
];

/// What starts it: the thread that does has the list before there is a process.
const START: &[i64] = &[
    libc::SYS_chdir,
    libc::SYS_execve,
    // tokio waits for its end by this one; what it opens leads to a network namespace at most (`setns` below).
    libc::SYS_pidfd_open,
    // An interpreter between this process and Envoy waits for what it runs.
    libc::SYS_wait4,
];

/// What other machines have no more.
#[cfg(target_arch = "x86_64")]
const OLD: &[i64] = &[
    libc::SYS_access,
    libc::SYS_arch_prctl,
    libc::SYS_chmod,
    libc::SYS_dup2,
    libc::SYS_epoll_wait,
    libc::SYS_fork,
    libc::SYS_lstat,
    libc::SYS_open,
    libc::SYS_poll,
    libc::SYS_readlink,
    libc::SYS_stat,
    libc::SYS_time,
    libc::SYS_unlink,
    libc::SYS_vfork,
];
#[cfg(not(target_arch = "x86_64"))]
const OLD: &[i64] = &[];

/// Every kind of namespace that clone(2) makes.
const NAMESPACES: i32 = libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWUTS;

/// What ioctl(2) is asked by libc, by a log that looks for a terminal, and by the standard library.
const REQUESTS: [u64; 4] = [libc::FIOCLEX, libc::FIONBIO, libc::FIONREAD, libc::TCGETS];
/// What prctl(2) is asked: names of threads and of memory.
const OF_A_THREAD: [i32; 3] = [libc::PR_GET_NAME, libc::PR_SET_NAME, libc::PR_SET_VMA];
/// Families of sockets that need nothing more; of netlink there is routing alone, for the machine's addresses.
const FAMILIES: [i32; 3] = [libc::AF_INET, libc::AF_INET6, libc::AF_UNIX];

/// The filters of a process, ready for the kernel.
pub(super) struct Jail([BpfProgram; 2]);

impl Jail {
    /// For a process that becomes this user (uid and gid), or stays who it is.
    ///
    /// # Errors
    /// The machine is one that the filter's maker doesn't know.
    pub(super) fn new(user: Option<(u32, u32)>) -> io::Result<Self> {
        let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
        let absent = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
        let no_clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
        Ok(Self([
            program(no_clone3, SeccompAction::Allow, absent)?,
            program(allowed(user)?, refused, SeccompAction::Allow)?,
        ]))
    }

    /// Holds this thread to it from now on, and all that it starts. The stricter answer of both filters counts, and
    /// the list, which doesn't let another one be added, comes last.
    ///
    /// # Errors
    /// The kernel takes no filter.
    pub(super) fn enter(&self) -> io::Result<()> {
        self.0
            .iter()
            .try_for_each(|program| apply_filter(program))
            .map_err(io::Error::other)
    }
}

type Calls = BTreeMap<i64, Vec<SeccompRule>>;

fn program(calls: Calls, others: SeccompAction, these: SeccompAction) -> io::Result<BpfProgram> {
    let machine = TargetArch::try_from(std::env::consts::ARCH).map_err(io::Error::other)?;
    let filter = SeccompFilter::new(calls, others, these, machine).map_err(io::Error::other)?;
    filter.try_into().map_err(io::Error::other)
}

fn allowed(user: Option<(u32, u32)>) -> io::Result<Calls> {
    let always = [SELF, FILES, SOCKETS, START, OLD].into_iter().flatten();
    let mut calls: Calls = always.map(|call| (*call, Vec::new())).collect();
    let flags = u64::from(NAMESPACES.unsigned_abs());
    let network = u64::from(libc::CLONE_NEWNET.unsigned_abs());
    let numbers = |all: &[i32]| -> Vec<u64> { all.iter().map(|one| one.unsigned_abs().into()).collect() };
    calls.insert(
        libc::SYS_clone,
        vec![rule(&[condition(0, SeccompCmpOp::MaskedEq(flags), 0)?])?],
    );
    // Zero would be any kind: a descriptor's own.
    calls.insert(libc::SYS_setns, one_of(1, &[network])?);
    calls.insert(libc::SYS_ioctl, one_of(1, &REQUESTS)?);
    calls.insert(libc::SYS_prctl, one_of(0, &numbers(&OF_A_THREAD))?);
    let netlink = u64::from(libc::AF_NETLINK.unsigned_abs());
    let route = u64::from(libc::NETLINK_ROUTE.unsigned_abs());
    let mut sockets = one_of(0, &numbers(&FAMILIES))?;
    let is = SeccompCmpOp::Eq;
    sockets.push(rule(&[
        condition(0, is.clone(), netlink)?,
        condition(2, is, route)?,
    ])?);
    calls.insert(libc::SYS_socket, sockets);
    if let Some((uid, gid)) = user {
        calls.insert(libc::SYS_setuid, one_of(0, &[uid.into()])?);
        calls.insert(libc::SYS_setgid, one_of(0, &[gid.into()])?);
        calls.insert(libc::SYS_setgroups, one_of(0, &[0])?);
    }
    Ok(calls)
}

/// The lower half: each of these arguments is an `int`, or a number below it.
fn condition(argument: u8, compare: SeccompCmpOp, value: u64) -> io::Result<SeccompCondition> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, compare, value).map_err(io::Error::other)
}

fn rule(all: &[SeccompCondition]) -> io::Result<SeccompRule> {
    SeccompRule::new(all.to_vec()).map_err(io::Error::other)
}

fn one_of(argument: u8, values: &[u64]) -> io::Result<Vec<SeccompRule>> {
    let rules = values
        .iter()
        .map(|value| rule(&[condition(argument, SeccompCmpOp::Eq, *value)?]));
    rules.collect()
}
