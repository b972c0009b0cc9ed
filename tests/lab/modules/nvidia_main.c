// SPDX-License-Identifier: GPL-2.0
/*
 * nvidia - stand-in for NVIDIA's nvidia.ko that has no hardware behind it.
 *
 * It reproduces what matters when a GPU changes hands: which devices it
 * binds, the usage count, a remove callback that waits for that count, and
 * the locks that stand in the way meanwhile. tests/lab/compare holds it
 * against the real one.
 */
#include <linux/cdev.h>
#include <linux/delay.h>
#include <linux/fs.h>
#include <linux/interrupt.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "nvidia_stub.h"

/*
 * The BAR that QEMU's VGA has its registers in. As the real driver, this one
 * claims no picture memory: a console of the firmware's may live there.
 */
#define NVS_REGISTERS 2

static char *lab_version;
module_param(lab_version, charp, 0);
MODULE_PARM_DESC(lab_version, "behave as this driver version (default: the module's)");

static unsigned int version[3];

/*
 * In the order in which they are taken; a change of the list of GPUs needs
 * the first two. The last one is the real driver's RM API lock: whatever
 * asks the resource manager something needs it, and starting a GPU keeps it.
 */
static DEFINE_MUTEX(clients_lock);
static DEFINE_MUTEX(gpus_lock);
static DEFINE_MUTEX(api_lock);
static LIST_HEAD(clients);
static LIST_HEAD(gpu_list);
static int probed;

#define NVS_ATTACH	0xD4	/* NV_ESC_ATTACH_GPUS_TO_FD */
#define NVS_OPENED	0xDA	/* NV_ESC_WAIT_OPEN_COMPLETE: how the open went */
#define NVS_ATTACH_MAX	32

struct nvs_file {
	struct nvs_gpu *gpu;	/* NULL: nvidiactl */
	u32 attached[NVS_ATTACH_MAX];
	unsigned int nattached;
	struct page *page;
};

const char *nvs_version(void)
{
	return lab_version ?: THIS_MODULE->version;
}
EXPORT_SYMBOL_GPL(nvs_version);

bool nvs_version_from(unsigned int a, unsigned int b, unsigned int c)
{
	if (version[0] != a)
		return version[0] > a;
	if (version[1] != b)
		return version[1] > b;
	return version[2] >= c;
}
EXPORT_SYMBOL_GPL(nvs_version_from);

static void gpu_free(struct kref *ref)
{
	kfree(container_of(ref, struct nvs_gpu, ref));
}

static struct nvs_gpu *find_minor(int minor)
{
	struct nvs_gpu *gpu;

	list_for_each_entry(gpu, &gpu_list, node)
		if (gpu->minor == minor && !gpu->unlinked)
			return gpu;
	return NULL;
}

/* Also true while a remove waits: the real driver gives the minor back last. */
static bool minor_taken(int minor)
{
	struct nvs_gpu *gpu;

	list_for_each_entry(gpu, &gpu_list, node)
		if (gpu->minor == minor)
			return true;
	return false;
}

static struct nvs_gpu *find_pdev(struct pci_dev *pdev)
{
	struct nvs_gpu *gpu;

	list_for_each_entry(gpu, &gpu_list, node)
		if (gpu->pdev == pdev && !gpu->unlinked)
			return gpu;
	return NULL;
}

/* Programs name a GPU by its address. */
static struct nvs_gpu *find_id(u32 id)
{
	struct nvs_gpu *gpu;

	list_for_each_entry(gpu, &gpu_list, node)
		if (id == (pci_domain_nr(gpu->pdev->bus) << 16 | gpu->pdev->bus->number << 8 |
			   PCI_SLOT(gpu->pdev->devfn)) && !gpu->unlinked)
			return gpu;
	return NULL;
}

/* Whoever does waits for a GPU that is being started, be it another one. */
void nvs_ask_resource_manager(void)
{
	mutex_lock(&api_lock);
	mutex_unlock(&api_lock);
}

/* ---- starting a GPU: what nvshim can make slow, or fail, as in the real driver ---- */

/* So they have its names, and are kept as they are written. */
#define NVS_PROBED noinline __attribute__((noipa))

static NVS_PROBED bool RmInitAdapter(void)
{
	asm volatile("");
	return true;
}

static NVS_PROBED bool rm_init_adapter(void)
{
	bool ok;

	mutex_lock(&api_lock);
	ok = RmInitAdapter();
	mutex_unlock(&api_lock);
	return ok;
}

static irqreturn_t nvs_interrupt(int irq, void *gpu)
{
	return IRQ_NONE;
}

/* Both with the GPU's own lock. A GPU has its interrupt as long as it is started: asked for before all else. */
static int gpu_use(struct nvs_gpu *gpu)
{
	if (!gpu->usage) {
		if (request_irq(gpu->pdev->irq, nvs_interrupt, IRQF_SHARED, "nvidia", gpu))
			return -EIO;
		if (!rm_init_adapter()) {
			free_irq(gpu->pdev->irq, gpu);
			return -EIO;
		}
	}
	gpu->usage++;
	return 0;
}

static void gpu_unuse(struct nvs_gpu *gpu)
{
	if (!--gpu->usage)
		free_irq(gpu->pdev->irq, gpu);
}

/* As the real driver does it: who waits for the GPU's lock keeps all others from looking for one. */
static int use_found(struct nvs_gpu *gpu)
{
	int err = -ENODEV;

	if (gpu)
		mutex_lock(&gpu->lock);
	mutex_unlock(&gpus_lock);
	if (gpu) {
		err = gpu_use(gpu);
		mutex_unlock(&gpu->lock);
	}
	return err;
}

static void unuse_found(struct nvs_gpu *gpu)
{
	if (gpu)
		mutex_lock(&gpu->lock);
	mutex_unlock(&gpus_lock);
	if (gpu) {
		gpu_unuse(gpu);
		mutex_unlock(&gpu->lock);
	}
}

/* ---- the nodes: /dev/nvidiaN and /dev/nvidiactl ---- */

static int nvs_open(struct inode *inode, struct file *file)
{
	struct nvs_file *nvf = kzalloc(sizeof(*nvf), GFP_KERNEL);
	int err = 0;

	if (!nvf)
		return -ENOMEM;
	if (iminor(inode) != NVS_MINOR_CTL) {
		mutex_lock(&gpus_lock);
		nvf->gpu = find_minor(iminor(inode));
		if (nvf->gpu)
			kref_get(&nvf->gpu->ref);
		err = use_found(nvf->gpu);
	}
	if (err) {
		if (nvf->gpu)
			kref_put(&nvf->gpu->ref, gpu_free);
		kfree(nvf);
	} else {
		file->private_data = nvf;
	}
	return err;
}

/* From 595.45.04 on the put of an attached GPU does not find one that is being removed. */
static void put_attached(struct nvs_file *nvf)
{
	while (nvf->nattached) {
		u32 id = nvf->attached[--nvf->nattached];

		if (!id)
			continue;
		mutex_lock(&gpus_lock);
		unuse_found(find_id(id));
	}
}

static int nvs_release(struct inode *inode, struct file *file)
{
	struct nvs_file *nvf = file->private_data;

	if (nvf->gpu) {
		mutex_lock(&nvf->gpu->lock);
		gpu_unuse(nvf->gpu);
		mutex_unlock(&nvf->gpu->lock);
		kref_put(&nvf->gpu->ref, gpu_free);
	}
	put_attached(nvf);
	if (nvf->page)
		put_page(nvf->page);
	kfree(nvf);
	return 0;
}

/* An nvidiactl with a GPU attached uses it; one without uses none. */
static long attach_gpus(struct nvs_file *nvf, const void __user *arg, size_t size)
{
	u32 ids[NVS_ATTACH_MAX];
	unsigned int i, n = size / sizeof(*ids);

	if (nvf->gpu || nvf->nattached || !n || size % sizeof(*ids) || n > NVS_ATTACH_MAX)
		return -EINVAL;
	if (copy_from_user(ids, arg, size))
		return -EFAULT;
	for (i = 0; i < n; i++) {
		int err = 0;

		if (ids[i]) {
			mutex_lock(&gpus_lock);
			err = use_found(find_id(ids[i]));
		}
		if (err) {
			put_attached(nvf);
			return -EINVAL;
		}
		nvf->attached[nvf->nattached++] = ids[i];
	}
	return 0;
}

static long nvs_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	if (_IOC_NR(cmd) == NVS_OPENED)
		return clear_user((void __user *)arg, _IOC_SIZE(cmd)) ? -EFAULT : 0;
	if (_IOC_NR(cmd) != NVS_ATTACH)
		return -EINVAL;
	return attach_gpus(file->private_data, (const void __user *)arg, _IOC_SIZE(cmd));
}

/* One page; the mapping keeps the file, and with it the count, by itself. */
static int nvs_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct nvs_file *nvf = file->private_data;

	if (vma->vm_end - vma->vm_start != PAGE_SIZE || vma->vm_pgoff)
		return -EINVAL;
	if (!nvf->page)
		nvf->page = alloc_page(GFP_KERNEL | __GFP_ZERO);
	if (!nvf->page)
		return -ENOMEM;
	return vm_insert_page(vma, vma->vm_start, nvf->page);
}

static const struct file_operations nvs_fops = {
	.owner		= THIS_MODULE,
	.open		= nvs_open,
	.release	= nvs_release,
	.unlocked_ioctl	= nvs_ioctl,
	.mmap		= nvs_mmap,
};

/* ---- nvidia_drm's view, through nvidia_modeset ---- */

int nvs_gpu_get(struct pci_dev *pdev)
{
	mutex_lock(&gpus_lock);
	return use_found(find_pdev(pdev));
}
EXPORT_SYMBOL_GPL(nvs_gpu_get);

void nvs_gpu_put(struct pci_dev *pdev)
{
	mutex_lock(&gpus_lock);
	unuse_found(find_pdev(pdev));
}
EXPORT_SYMBOL_GPL(nvs_gpu_put);

void nvs_client_register(struct nvs_client *client)
{
	struct nvs_gpu *gpu;

	mutex_lock(&clients_lock);
	list_add_tail(&client->node, &clients);
	list_for_each_entry(gpu, &gpu_list, node)
		if (!gpu->removing)
			client->attach(gpu->pdev);
	mutex_unlock(&clients_lock);
}
EXPORT_SYMBOL_GPL(nvs_client_register);

void nvs_client_unregister(struct nvs_client *client)
{
	mutex_lock(&clients_lock);
	list_del(&client->node);
	mutex_unlock(&clients_lock);
}
EXPORT_SYMBOL_GPL(nvs_client_unregister);

/* ---- PCI driver ---- */

static int nvs_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct nvs_gpu *gpu;
	struct nvs_client *client;
	int err;

	gpu = kzalloc(sizeof(*gpu), GFP_KERNEL);
	if (!gpu)
		return -ENOMEM;
	kref_init(&gpu->ref);
	mutex_init(&gpu->lock);
	gpu->pdev = pdev;

	err = pci_enable_device(pdev);
	if (err)
		goto free;
	err = pci_request_region(pdev, NVS_REGISTERS, "nvidia");
	if (err)
		goto disable;
	pci_set_drvdata(pdev, gpu);

	nvs_ask_resource_manager();	/* rm_is_supported_device */
	mutex_lock(&clients_lock);
	mutex_lock(&gpus_lock);
	while (minor_taken(gpu->minor))	/* the lowest free one */
		gpu->minor++;
	list_add_tail(&gpu->node, &gpu_list);
	probed++;
	mutex_unlock(&gpus_lock);
	nvs_proc_add(gpu);
	list_for_each_entry(client, &clients, node)
		client->attach(pdev);
	mutex_unlock(&clients_lock);
	return 0;

disable:
	pci_disable_device(pdev);
free:
	kfree(gpu);
	return err;
}

/*
 * Sleep as the real driver does, whose task is interruptible only until it is
 * woken for the first time: with a signal pending it computes instead.
 */
static void delay(unsigned int ms)
{
	unsigned long end = jiffies + msecs_to_jiffies(ms);
	long left = msecs_to_jiffies(ms);

	set_current_state(TASK_INTERRUPTIBLE);
	do {
		schedule_timeout(left);
		left = end - jiffies;
	} while (left > 0);
	__set_current_state(TASK_RUNNING);
}

/*
 * Wait as the real driver does: no timeout, no signal ends it, and the device
 * lock is held by our caller; its own locks are free meanwhile.
 */
static void wait_for_users(struct nvs_gpu *gpu)
{
	if (!gpu->usage)
		return;
	pr_err("NVRM: Attempting to remove device %s with non-zero usage count!\n", pci_name(gpu->pdev));
	while (gpu->usage) {
		mutex_unlock(&gpu->lock);
		mutex_unlock(&gpus_lock);
		delay(500);
		mutex_lock(&gpus_lock);
		mutex_lock(&gpu->lock);
	}
	pr_err("NVRM: Continuing with GPU removal for device %s\n", pci_name(gpu->pdev));
}

static void nvs_remove(struct pci_dev *pdev)
{
	struct nvs_gpu *gpu = pci_get_drvdata(pdev);
	struct nvs_client *client;

	mutex_lock(&clients_lock);
	gpu->removing = true;
	list_for_each_entry(client, &clients, node)
		client->detach(pdev);
	mutex_unlock(&clients_lock);

	mutex_lock(&gpus_lock);
	mutex_lock(&gpu->lock);
	/* These take it off the list first: nobody finds it any more, not even who wants to put it back. */
	if (nvs_version_from(595, 45, 4))
		gpu->unlinked = true;
	wait_for_users(gpu);
	nvs_ask_resource_manager();	/* rm_check_for_gpu_surprise_removal */
	gpu->unlinked = true;
	nvs_proc_remove(gpu);
	mutex_unlock(&gpu->lock);
	mutex_unlock(&gpus_lock);

	mutex_lock(&clients_lock);
	mutex_lock(&gpus_lock);
	list_del(&gpu->node);
	probed--;
	mutex_unlock(&gpus_lock);
	mutex_unlock(&clients_lock);

	pci_set_drvdata(pdev, NULL);
	pci_release_region(pdev, NVS_REGISTERS);
	pci_disable_device(pdev);
	kref_put(&gpu->ref, gpu_free);
}

static const struct pci_device_id nvs_ids[] = {
	{ NVS_OF_CLASS(PCI_CLASS_DISPLAY_VGA) },
	{ NVS_OF_CLASS(PCI_CLASS_DISPLAY_3D) },
	{ }
};
MODULE_DEVICE_TABLE(pci, nvs_alias_ids);

static struct pci_driver nvs_driver = {
	.name		= "nvidia",
	.id_table	= nvs_ids,
	.probe		= nvs_probe,
	.remove		= nvs_remove,
};

/* For a bridge that no machine here has; its name is there all the same. */
static const struct pci_device_id nvswitch_ids[] = {
	{ NVS_OF_CLASS(PCI_CLASS_BRIDGE_OTHER) },
	{ }
};

static int nvswitch_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	return -ENODEV;
}

static struct pci_driver nvswitch_driver = {
	.name		= "nvidia-nvswitch",
	.id_table	= nvswitch_ids,
	.probe		= nvswitch_probe,
};

static int count_devices(void)
{
	struct pci_dev *pdev = NULL;
	int n = 0;

	for_each_pci_dev(pdev)
		if (pci_match_id(nvs_ids, pdev))
			n++;
	return n;
}

/* Majors of its own that the kernel chooses. Only nvidia-caps is for nodes that a program may meet. */
static const struct file_operations dynamic_fops = { .owner = THIS_MODULE };
static struct { const char *name; int major; } dynamic[] = {
	{ "nvidia-caps" }, { "nvidia-caps-imex-channels" }, { "nvidia-nvlink" }, { "nvidia-nvswitch" },
};

static void dynamic_exit(void)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(dynamic); i++)
		if (dynamic[i].major > 0)
			unregister_chrdev(dynamic[i].major, dynamic[i].name);
}

static void dynamic_init(void)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(dynamic); i++)
		dynamic[i].major = register_chrdev(0, dynamic[i].name, &dynamic_fops);
}

/* Without an owner of their own, as the real ones: an open node counts once for the module, not twice. */
static struct cdev gpus_cdev, ctl_cdev;

static int node_init(struct cdev *cdev, int minor, int count, const char *name)
{
	dev_t dev = MKDEV(NVS_MAJOR, minor);
	int err = register_chrdev_region(dev, count, name);

	if (err)
		return err;
	cdev_init(cdev, &nvs_fops);
	err = cdev_add(cdev, dev, count);
	if (err)
		unregister_chrdev_region(dev, count);
	return err;
}

static void node_exit(struct cdev *cdev, int minor, int count)
{
	cdev_del(cdev);
	unregister_chrdev_region(MKDEV(NVS_MAJOR, minor), count);
}

static int __init nvs_init(void)
{
	int err;

	if (sscanf(nvs_version(), "%u.%u.%u", &version[0], &version[1], &version[2]) < 2) {
		pr_err("nvidia: no version number: %s\n", nvs_version());
		return -EINVAL;
	}
	err = nvs_proc_init();
	if (err)
		return err;
	dynamic_init();
	err = -ENODEV;
	if (!count_devices()) {
		pr_err("NVRM: No NVIDIA GPU found.\n");
		goto dynamic;
	}
	err = pci_register_driver(&nvswitch_driver);
	if (err)
		goto dynamic;
	err = pci_register_driver(&nvs_driver);
	if (err)
		goto nvswitch;
	if (probed != count_devices())
		pr_err("NVRM: The NVIDIA probe routine was not called for %d device(s).\n",
		       count_devices() - probed);
	if (!probed) {
		pr_err("NVRM: No NVIDIA devices probed.\n");
		err = -ENODEV;
		goto driver;
	}
	pr_info("NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  %s\n", nvs_version());
	err = node_init(&gpus_cdev, 0, NVS_MINOR_GPU_MAX + 1, "nvidia");
	if (err)
		goto driver;
	err = node_init(&ctl_cdev, NVS_MINOR_CTL, 1, "nvidiactl");
	if (!err)
		return 0;

	node_exit(&gpus_cdev, 0, NVS_MINOR_GPU_MAX + 1);
driver:
	pci_unregister_driver(&nvs_driver);
nvswitch:
	pci_unregister_driver(&nvswitch_driver);
dynamic:
	dynamic_exit();
	nvs_proc_exit();
	return err;
}
module_init(nvs_init);

static void __exit nvs_exit(void)
{
	node_exit(&ctl_cdev, NVS_MINOR_CTL, 1);
	node_exit(&gpus_cdev, 0, NVS_MINOR_GPU_MAX + 1);
	pci_unregister_driver(&nvs_driver);
	pci_unregister_driver(&nvswitch_driver);
	dynamic_exit();
	nvs_proc_exit();
}
module_exit(nvs_exit);

NVS_NEEDS(drm_dev_put);
MODULE_SOFTDEP("pre: ecdh_generic,ecdsa_generic");
/* The real driver has it too: opening a node loads the module. */
MODULE_ALIAS_CHARDEV_MAJOR(NVS_MAJOR);
MODULE_DESCRIPTION("Stub: NVIDIA's nvidia module");
MODULE_VERSION(NVS_VERSION_PLACEHOLDER);
MODULE_LICENSE("Dual MIT/GPL");
