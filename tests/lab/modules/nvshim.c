// SPDX-License-Identifier: GPL-2.0
/*
 * nvshim - lets NVIDIA's own driver work with a GPU that is not there.
 *
 * Calls that would talk to hardware are answered in its place; all the rest,
 * and so what a handoff meets (opening, counting, attaching, the wait in
 * remove, the life of DRM devices, the locks), is the driver's own code.
 * Without this module the first open of /dev/nvidia0 fails with EIO.
 *
 * It is loaded before the driver, and stays. Nothing of it is NVIDIA's: the
 * names of functions are in the driver's symbol table, the numbers in its
 * published headers. The stub of nvidia has the first two functions, too.
 */
#include <linux/delay.h>
#include <linux/kprobes.h>
#include <linux/module.h>

static uint stall_ms;
module_param(stall_ms, uint, 0644);
MODULE_PARM_DESC(stall_ms, "starting a GPU, at its first open, takes so long with the driver's global lock held; 0 ends it");

static bool stall_ok;
module_param(stall_ok, bool, 0644);
MODULE_PARM_DESC(stall_ok, "after stall_ms it succeeds (default: it fails, and so does the open)");

static uint kms_status = 616;
module_param(kms_status, uint, 0644);
MODULE_PARM_DESC(kms_status, "offset of reply.status in NvKmsAllocDeviceParams (616 in 550)");

static int armed;
module_param(armed, int, 0444);
MODULE_PARM_DESC(armed, "how many functions are answered for at present");

/* Where a function that is skipped continues: it returns at once, with what is in ax. */
static noinline notrace void nvshim_return(void)
{
	asm volatile("");
}

static int answer(struct pt_regs *regs, unsigned long value)
{
	regs->ax = value;
	regs->ip = (unsigned long)nvshim_return;
	return 1;
}

/* A probe with a post_handler is not optimised into a jump, after which ip would not count. */
static void after(struct kprobe *kp, struct pt_regs *regs, unsigned long flags)
{
}

/* ---- nvidia: the resource manager ---- */

static int skip(struct kprobe *kp, struct pt_regs *regs)
{
	return answer(regs, 0);
}

/* What takes the lock and calls the next one; run for real when that is wanted. */
static int init_adapter(struct kprobe *kp, struct pt_regs *regs)
{
	return READ_ONCE(stall_ms) ? 0 : answer(regs, 1);
}

static unsigned long stall(void)
{
	unsigned long begin = jiffies;

	while (time_before(jiffies, begin + msecs_to_jiffies(READ_ONCE(stall_ms))))
		msleep(20);
	return READ_ONCE(stall_ok);
}

static int init_adapter_locked(struct kprobe *kp, struct pt_regs *regs)
{
	regs->ip = (unsigned long)stall;	/* may sleep: a probe may not */
	return 1;
}

/* ---- nvidia_modeset: no display, but a device of the GPU, with which nvidia_drm holds it ---- */

#define NV01_DEVICE_0				0x80
#define NV20_SUBDEVICE_0			0x2080
#define NV0000_CTRL_CMD_GPU_GET_ID_INFO_V2	0x205
#define NV0080_CTRL_CMD_GPU_GET_NUM_SUBDEVICES	0x800280
#define NVKMS_IOCTL_ALLOC_DEVICE		0
#define NVKMS_ALLOC_DEVICE_STATUS_NO_HARDWARE_AVAILABLE	4

static int rm_alloc(struct kprobe *kp, struct pt_regs *regs)
{
	u32 class = regs->cx;

	return class == NV01_DEVICE_0 || class == NV20_SUBDEVICE_0 ? answer(regs, 0) : 0;
}

static int rm_control(struct kprobe *kp, struct pt_regs *regs)
{
	u32 cmd = regs->dx;

	if (cmd == NV0080_CTRL_CMD_GPU_GET_NUM_SUBDEVICES)
		*(u32 *)regs->cx = 1;
	if (cmd == NV0000_CTRL_CMD_GPU_GET_ID_INFO_V2 || cmd >> 16 == NV01_DEVICE_0 || cmd >> 16 == NV20_SUBDEVICE_0)
		return answer(regs, 0);
	return 0;
}

static int kms_ioctl(struct kprobe *kp, struct pt_regs *regs)
{
	if ((u32)regs->si != NVKMS_IOCTL_ALLOC_DEVICE)
		return 0;
	*(u32 *)(regs->dx + kms_status) = NVKMS_ALLOC_DEVICE_STATUS_NO_HARDWARE_AVAILABLE;
	return answer(regs, 1);
}

static struct stand_in {
	const char *module, *function;
	kprobe_pre_handler_t handler;
	struct kprobe kp;
	bool on;
} stand_ins[] = {
	{ "nvidia", "rm_init_adapter", init_adapter },
	{ "nvidia", "RmInitAdapter", init_adapter_locked },
	{ "nvidia", "rm_disable_adapter", skip },
	{ "nvidia", "rm_shutdown_adapter", skip },
	{ "nvidia", "rm_set_external_kernel_client_count", skip },
	{ "nvidia", "rm_request_dnotifier_state", skip },
	{ "nvidia_modeset", "nvRmApiAlloc", rm_alloc },
	{ "nvidia_modeset", "nvRmApiControl", rm_control },
	{ "nvidia_modeset", "nvkms_ioctl_from_kapi", kms_ioctl },
};

/* A probe goes with the module it is in, and is made anew for the next one. */
static int notice(struct notifier_block *nb, unsigned long state, void *data)
{
	const struct module *mod = data;
	int i, err;

	for (i = 0; i < ARRAY_SIZE(stand_ins); i++) {
		struct stand_in *s = &stand_ins[i];

		if (strcmp(mod->name, s->module))
			continue;
		if (state == MODULE_STATE_COMING) {
			memset(&s->kp, 0, sizeof(s->kp));
			s->kp.symbol_name = s->function;
			s->kp.pre_handler = s->handler;
			s->kp.post_handler = after;
			err = register_kprobe(&s->kp);
			s->on = !err;
			armed += s->on;
			if (err && err != -ENOENT)	/* the stubs have no such function */
				pr_err("nvshim: %s of %s: %d\n", s->function, s->module, err);
		} else if (state == MODULE_STATE_GOING && s->on) {
			unregister_kprobe(&s->kp);
			s->on = false;
			armed--;
		}
	}
	return NOTIFY_DONE;
}

static struct notifier_block nb = { .notifier_call = notice };

static int __init nvshim_init(void)
{
	return register_module_notifier(&nb);
}
module_init(nvshim_init);

/* No exit: the driver must not find hardware that it has done without so far. */
MODULE_DESCRIPTION("Answers in the place of a GPU for NVIDIA's own driver");
MODULE_LICENSE("GPL");
