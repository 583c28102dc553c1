"""seccomp: which system calls the process and its children may still make.

An allow-list: what is not named fails with EPERM, what is newer than the list with ENOSYS (so that
the C library falls back). What CPython, numpy and sympy use is there; programs, sockets, signals
to others, namespaces, mounts, ptrace, keyrings, bpf, perf and inotify are not.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import platform
import struct
from collections.abc import Sequence

from .kernel import syscall

__all__ = ["install", "program"]

_TABLE = """
read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69
pwritev:296:70 open:2:- openat:257:56 openat2:437:437 close:3:57 close_range:436:436 creat:85:-
stat:4:- fstat:5:80 lstat:6:- newfstatat:262:79 statx:332:291 lseek:8:62 access:21:-
faccessat:269:48 faccessat2:439:439 mkdir:83:- mkdirat:258:34 rmdir:84:- unlink:87:- unlinkat:263:35
rename:82:- renameat:264:38 renameat2:316:276 link:86:- linkat:265:37 symlink:88:- symlinkat:266:36
readlink:89:- readlinkat:267:78 chmod:90:- fchmod:91:52 fchmodat:268:53
ftruncate:77:46 fallocate:285:47 fadvise64:221:223 utime:132:- utimes:235:- utimensat:280:88
futimesat:261:- getdents:78:- getdents64:217:61 getcwd:79:17 chdir:80:49 fchdir:81:50 dup:32:23
dup2:33:- dup3:292:24 flock:73:32 fsync:74:82 fdatasync:75:83 copy_file_range:326:285 sendfile:40:71
umask:95:166 statfs:137:43 fstatfs:138:44 mmap:9:222 munmap:11:215 mremap:25:216 mprotect:10:226
madvise:28:233 brk:12:214 msync:26:227 mincore:27:232 membarrier:324:283 rt_sigaction:13:134
rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136 rt_sigtimedwait:128:137
rt_sigsuspend:130:133 sigaltstack:131:132 restart_syscall:219:128 pause:34:- alarm:37:-
setitimer:38:103 getitimer:36:102 exit:60:93 exit_group:231:94 wait4:61:260 waitid:247:95 fork:57:-
vfork:58:- getpid:39:172 getppid:110:173 gettid:186:178 getuid:102:174 geteuid:107:175
getgid:104:176 getegid:108:177 getgroups:115:158 getresuid:118:148 getresgid:120:150 getpgid:121:155
getpgrp:111:- getsid:124:156 uname:63:160 sysinfo:99:179
times:100:153 getrusage:98:165 getrlimit:97:163 setrlimit:160:164
getpriority:140:141 getcpu:309:168 sched_yield:24:124 sched_getaffinity:204:123
sched_getparam:143:121 sched_getscheduler:145:120 sched_get_priority_max:146:125
sched_get_priority_min:147:126 clock_gettime:228:113 clock_getres:229:114 clock_nanosleep:230:115
gettimeofday:96:169 time:201:- nanosleep:35:101 futex:202:98 futex_waitv:449:449
set_robust_list:273:99 get_robust_list:274:100 set_tid_address:218:96 rseq:334:293 arch_prctl:158:-
poll:7:- ppoll:271:73 select:23:- pselect6:270:72 epoll_create:213:- epoll_create1:291:20
epoll_ctl:233:21 epoll_wait:232:- epoll_pwait:281:22 epoll_pwait2:441:441 eventfd:284:-
eventfd2:290:19 pipe:22:- pipe2:293:59 sendto:44:206 recvfrom:45:207 sendmsg:46:211 recvmsg:47:212
shutdown:48:210 getsockopt:55:209 setsockopt:54:208 getsockname:51:204 getpeername:52:205
getrandom:318:278
"""
"""Name, number on x86_64, number on aarch64."""

_ARCH = {"x86_64": (0, 0xC000003E, 317), "aarch64": (1, 0xC00000B7, 277)}
"""Column of the table, AUDIT_ARCH of the kernel, number of seccomp(2)."""
_PAIRS = tuple(kind | flags for kind in (1, 5) for flags in (0, 0x800, 0x80000, 0x80800))
"""SOCK_STREAM and SOCK_SEQPACKET, with SOCK_NONBLOCK and SOCK_CLOEXEC or without."""
_CHECKED: dict[str, tuple[tuple[int, int], tuple[tuple[int, str, tuple[int, ...]], ...]]] = {
    # Threads and forks, but no new namespaces, no tracing, no children in the parent's name, and
    # no signal at a child's end but SIGCHLD: SIGCONT would wake a parent that was stopped.
    "clone": ((56, 220), ((0, "without", (0x7E02A080,)), (0, "ending", (0, 17)))),
    "prctl": ((157, 167), ((0, "among", (15, 16, 23, 0x53564D41)),)),  # names, capabilities, naming memory
    "ioctl": ((16, 29), ((1, "among", (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),)),  # terminal? FIO*
    # Not F_SETOWN, F_SETSIG, F_SETOWN_EX, F_NOTIFY, F_SETLEASE: they send signals to others.
    "fcntl": ((72, 25), ((1, "except", (8, 10, 15, 1024, 1026)),)),
    # AF_UNIX, and not of datagrams: those can be sent to any socket that has a path.
    "socketpair": ((53, 199), ((0, "among", (1,)), (1, "among", _PAIRS))),
    "prlimit64": ((302, 261), ((0, "among", (0,)),)),  # of itself, not of the others
}  # fmt: skip
_CLONE3 = 435
_LAST = 450
_LOAD, _JEQ, _JSET, _JGT, _AND, _RET = 0x20, 0x15, 0x45, 0x25, 0x54, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_DENY = 0x00050000 | errno.EPERM
_MISSING = 0x00050000 | errno.ENOSYS


@functools.cache
def program(machine: str) -> bytes:
    """The filter as BPF for one architecture ("x86_64", "aarch64").

    Raises:
        OSError: no table for this architecture.
    """
    if machine not in _ARCH:
        raise OSError(errno.ENOSYS, f"no seccomp filter for {machine}")
    column, arch, _ = _ARCH[machine]
    lines: list[tuple[int, int, int, int]] = [(_LOAD, 0, 0, 4), (_JEQ, 1, 0, arch), (_RET, 0, 0, _KILL)]
    lines += [(_LOAD, 0, 0, 0), (_JGT, 0, 1, _LAST), (_RET, 0, 0, _MISSING)]
    lines += [(_JEQ, 0, 1, _CLONE3), (_RET, 0, 0, _MISSING)]  # its flags lie in memory, out of sight
    for numbers, checks in _CHECKED.values():
        body = [line for check in checks for line in _check(*check)] + [(_RET, 0, 0, _ALLOW)]
        lines += [(_JEQ, 0, len(body), numbers[column]), *body]
    for number in _numbers(column):
        lines += [(_JEQ, 0, 1, number), (_RET, 0, 0, _ALLOW)]
    lines.append((_RET, 0, 0, _DENY))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def _check(argument: int, how: str, what: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Refuse, or fall through: the low half of an argument is, or is not, one of some values.

    "without": none of these bits; "ending": its lowest seven bits are one of them.
    """
    body = [(_LOAD, 0, 0, 16 + 8 * argument)]
    if how == "without":
        return [*body, (_JSET, 0, 1, what[0]), (_RET, 0, 0, _DENY)]
    if how == "except":
        return [*body, *(line for value in what for line in ((_JEQ, 0, 1, value), (_RET, 0, 0, _DENY)))]
    if how == "ending":
        body.append((_AND, 0, 0, 0x7F))
    return [
        *body,
        *((_JEQ, len(what) - place, 0, value) for place, value in enumerate(what)),
        (_RET, 0, 0, _DENY),
    ]


def _numbers(column: int) -> list[int]:
    rows = (entry.split(":")[1 + column] for entry in _TABLE.split())
    return sorted(int(number) for number in rows if number != "-")


def install() -> None:
    """Put the filter in place, for good. Needs ``no_new_privileges``.

    Raises:
        OSError: the kernel has no seccomp, or the architecture no table.
    """
    code = program(platform.machine())
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("=H6xQ", len(code) // 8, ctypes.addressof(buffer))
    syscall(_ARCH[platform.machine()][2], 1, 0, ctypes.create_string_buffer(header, len(header)))
