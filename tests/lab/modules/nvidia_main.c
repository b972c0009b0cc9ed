// SPDX-License-Identifier: GPL-2.0
/*
 * nvidia - stand-in for NVIDIA's nvidia.ko that has no hardware behind it.
 *
 * It reproduces what matters when a GPU changes hands: which devices it
 * binds, the usage count, and a remove callback that waits for that count.
 */
#include <linux/cdev.h>
#include <linux/delay.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/slab.h>

#include "nvidia_stub.h"

/*
 * The BAR that QEMU's VGA has its registers in. As the real driver, this one
 * claims no picture memory: a console of the firmware's may live there.
 */
#define NVS_REGISTERS 2

static char *lab_version;
module_param(lab_version, charp, 0444);
MODULE_PARM_DESC(lab_version, "behave as this driver version (default: the module's)");

static unsigned int version[3];

/* clients_lock is taken first. A change of the list of GPUs needs both. */
static DEFINE_MUTEX(clients_lock);
static DEFINE_MUTEX(gpus_lock);
static LIST_HEAD(clients);
static LIST_HEAD(gpu_list);
static int probed;
static int ctl_usage;

struct nvs_file {
	struct nvs_gpu *gpu;	/* NULL: nvidiactl */
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
		if (gpu->pdev == pdev)
			return gpu;
	return NULL;
}

/* ---- the nodes: /dev/nvidiaN and /dev/nvidiactl ---- */

static int nvs_open(struct inode *inode, struct file *file)
{
	struct nvs_file *nvf = kzalloc(sizeof(*nvf), GFP_KERNEL);
	int err = 0;

	if (!nvf)
		return -ENOMEM;
	mutex_lock(&gpus_lock);
	if (iminor(inode) == NVS_MINOR_CTL) {
		ctl_usage++;
	} else {
		nvf->gpu = find_minor(iminor(inode));
		if (nvf->gpu) {
			kref_get(&nvf->gpu->ref);
			nvf->gpu->usage++;
		} else {
			err = -ENODEV;
		}
	}
	mutex_unlock(&gpus_lock);
	if (err)
		kfree(nvf);
	else
		file->private_data = nvf;
	return err;
}

static int nvs_release(struct inode *inode, struct file *file)
{
	struct nvs_file *nvf = file->private_data;

	mutex_lock(&gpus_lock);
	if (!nvf->gpu)
		ctl_usage--;
	else if (!nvf->gpu->unlinked)
		nvf->gpu->usage--;
	mutex_unlock(&gpus_lock);
	if (nvf->gpu)
		kref_put(&nvf->gpu->ref, gpu_free);
	if (nvf->page)
		put_page(nvf->page);
	kfree(nvf);
	return 0;
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
	.mmap		= nvs_mmap,
};

/* ---- nvidia_drm's view, through nvidia_modeset ---- */

int nvs_gpu_get(struct pci_dev *pdev)
{
	struct nvs_gpu *gpu;

	mutex_lock(&gpus_lock);
	gpu = find_pdev(pdev);
	if (gpu)
		gpu->usage++;
	mutex_unlock(&gpus_lock);
	return gpu ? 0 : -ENODEV;
}
EXPORT_SYMBOL_GPL(nvs_gpu_get);

void nvs_gpu_put(struct pci_dev *pdev)
{
	struct nvs_gpu *gpu;

	mutex_lock(&gpus_lock);
	gpu = find_pdev(pdev);
	if (gpu && !gpu->unlinked)
		gpu->usage--;
	mutex_unlock(&gpus_lock);
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
	gpu->pdev = pdev;

	err = pci_enable_device(pdev);
	if (err)
		goto free;
	err = pci_request_region(pdev, NVS_REGISTERS, "nvidia");
	if (err)
		goto disable;
	pci_set_drvdata(pdev, gpu);

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
 * Wait as the real driver does: no timeout, deaf to every signal, and with
 * the device lock held by our caller. From 595.45.04 on the GPU is taken off
 * the list first, so later closes are not counted and the wait never ends.
 */
static void wait_for_users(struct nvs_gpu *gpu)
{
	bool said = false;
	int users;

	for (;;) {
		mutex_lock(&gpus_lock);
		if (!said && nvs_version_from(595, 45, 4)) {
			gpu->usage += ctl_usage;
			gpu->unlinked = true;
		}
		users = gpu->usage + (gpu->unlinked ? 0 : ctl_usage);
		mutex_unlock(&gpus_lock);
		if (!users)
			break;
		if (!said)
			pr_err("NVRM: Attempting to remove device %s with non-zero usage count!\n",
			       pci_name(gpu->pdev));
		said = true;
		schedule_timeout_uninterruptible(HZ / 2);
	}
	if (said)
		pr_err("NVRM: Continuing with GPU removal for device %s\n",
		       pci_name(gpu->pdev));
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

	wait_for_users(gpu);

	nvs_proc_remove(gpu);
	mutex_lock(&clients_lock);
	mutex_lock(&gpus_lock);
	gpu->unlinked = true;
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
	{ PCI_DEVICE(PCI_VENDOR_ID_NVIDIA, PCI_ANY_ID),
	  .class = PCI_CLASS_DISPLAY_VGA << 8, .class_mask = ~0 },
	{ PCI_DEVICE(PCI_VENDOR_ID_NVIDIA, PCI_ANY_ID),
	  .class = PCI_CLASS_DISPLAY_3D << 8, .class_mask = ~0 },
	{ }
};
MODULE_DEVICE_TABLE(pci, nvs_ids);

static struct pci_driver nvs_driver = {
	.name		= "nvidia",
	.id_table	= nvs_ids,
	.probe		= nvs_probe,
	.remove		= nvs_remove,
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
	err = __register_chrdev(NVS_MAJOR, 0, NVS_MINOR_GPU_MAX + 1, "nvidia", &nvs_fops);
	if (err)
		goto proc;
	err = __register_chrdev(NVS_MAJOR, NVS_MINOR_CTL, 1, "nvidiactl", &nvs_fops);
	if (err)
		goto chrdev;
	err = pci_register_driver(&nvs_driver);
	if (err)
		goto ctl;
	if (probed) {
		pr_info("NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  %s\n",
			nvs_version());
		return 0;
	}

	if (count_devices()) {
		pr_err("NVRM: The NVIDIA probe routine was not called for %d device(s).\n",
		       count_devices());
		pr_err("NVRM: No NVIDIA devices probed.\n");
	} else {
		pr_err("NVRM: No NVIDIA GPU found.\n");
	}
	err = -ENODEV;
	pci_unregister_driver(&nvs_driver);
ctl:
	__unregister_chrdev(NVS_MAJOR, NVS_MINOR_CTL, 1, "nvidiactl");
chrdev:
	__unregister_chrdev(NVS_MAJOR, 0, NVS_MINOR_GPU_MAX + 1, "nvidia");
proc:
	nvs_proc_exit();
	return err;
}
module_init(nvs_init);

static void __exit nvs_exit(void)
{
	pci_unregister_driver(&nvs_driver);
	__unregister_chrdev(NVS_MAJOR, NVS_MINOR_CTL, 1, "nvidiactl");
	__unregister_chrdev(NVS_MAJOR, 0, NVS_MINOR_GPU_MAX + 1, "nvidia");
	nvs_proc_exit();
}
module_exit(nvs_exit);

/* The real driver has it too: opening a node loads the module. */
MODULE_ALIAS_CHARDEV_MAJOR(NVS_MAJOR);
MODULE_DESCRIPTION("Stub: NVIDIA's nvidia module");
MODULE_VERSION(NVS_VERSION_PLACEHOLDER);
MODULE_LICENSE("GPL");
